"""How the two gradients stand to each other while a run goes on: at the weights, whatever the method does."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from fastlur.loop import StepEvent
from fastlur.losses import cross_entropy
from fastlur.statistics import Statistics
from fastlur.world import mode

from .splits import Data

LOOKS = 11  # over a run, its first and last step among them
PROBE = 256  # items a side


class Cosines:
    """A callback: the cosine between ∇L_r and ∇L_f on fixed batches, in train mode, leaving no trace.

    Attributes:
        forget_loss: the loss that the run is to be given, so that what it makes of itself can be looked at too.
        found: (step, cosine) pairs.
        seconds: what looking took, of the processor.
    """

    def __init__(self, forget: Data, retain: Data, forget_loss: Any) -> None:
        self.forget, self.retain = ((x[:PROBE], y[:PROBE]) for x, y in (forget, retain))
        self.forget_loss = _Seen(forget_loss) if hasattr(forget_loss, "prepare") else forget_loss
        self.found: list[tuple[int, float]] = []
        self.seconds = 0.0

    def __call__(self, event: StepEvent) -> None:
        every = max(1, event.steps // (LOOKS - 1))
        if event.step != 1 and event.step % every:
            return
        began = time.process_time()
        with mode(event.model, True), Statistics(event.model).frozen(), torch.enable_grad():
            kept, gone = (
                self._gradient(event.model, loss, batch)
                for loss, batch in ((cross_entropy, self.retain), (_made(self.forget_loss), self.forget))
            )
        cosine = torch.nn.functional.cosine_similarity(kept, gone, dim=0)
        self.found.append((event.step, round(float(cosine), 4)))
        self.seconds += time.process_time() - began

    def _gradient(self, model: nn.Module, loss: Any, batch: Data) -> torch.Tensor:
        moving = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss(model, batch), moving, allow_unused=True)
        return torch.cat([g.reshape(-1).double() for g in found if g is not None])


class _Seen:
    """A target that is made in the run, and what was made."""

    def __init__(self, target: Any) -> None:
        self.target, self.models, self.made = target, target.models, target

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        return self.target(model, batch)

    def prepare(self, passes: Any) -> Any:
        self.made = self.target.prepare(passes)
        return self.made


def _made(loss: Any) -> Any:
    return loss.made if isinstance(loss, _Seen) else loss
