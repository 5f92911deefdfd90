"""The model as it was given, evaluated without a second module."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlur.losses import logits_and_targets
from fastlur.passes import Passes, Which
from fastlur.space import Vector
from fastlur.world import passing


class Frozen:
    """A copy of the moving parameters and the buffers, lent to the module for one forward at a time.

    Made in `prepare`, when the model is as it was given; costs one parameter-sized vector.

    Args:
        passes: those of the method; whose model it is.
    """

    def __init__(self, passes: Passes) -> None:
        self.theta: Vector = passes.space.copy()
        self._passes = passes
        self._model = passes.space.model
        self._buffers = {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}

    def logits(self, which: Which) -> Tensor:
        """What the model as given says of this step's batch: logits, shape (n, classes), in eval mode, no gradient.

        Parameters and buffers are swapped, so no graph that is still to be differentiated may be alive.
        """
        passes = self._passes
        now = {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}
        with passing(self._model, passes.space.device, passes.precision, False), torch.no_grad():
            try:
                passes.statistics.take(self._buffers)
                with passes.space.at(self.theta):
                    return logits_and_targets(self._model, passes.batch(which))[0]
            finally:
                passes.statistics.take(now)
