"""A model kept as it is now, to be asked later, without a second module.

Distillation needs the answers of the model as it was given (or of one that knows nothing) while the model changes. What
is kept is a vector and the buffers; to answer, the module itself is pointed at them for one forward in eval mode.

That swap must not happen while a graph of the module is alive, so a reference is asked before the pass that uses its
answer, and refuses to be asked inside one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastlur.errors import ModelError
from fastlur.losses import logits_and_targets, split
from fastlur.passes import Passes
from fastlur.space import Vector
from fastlur.world import borrowed_random, derive, passing, seed_torch


class Frozen:
    """The model at a point of its space, with the buffers that it has now.

    It answers in eval mode, in the precision of the passes, and leaves no trace: parameters, buffers, modes, gradients
    and random state are as before. What a module draws in eval mode is fixed by the seed and the step.

    Args:
        passes: of the run.
        point: where; None: a copy of θ as it is now. Parameters that do not move are not part of it.
    """

    def __init__(self, passes: Passes, point: Vector | None = None) -> None:
        self.passes = passes
        self.point = passes.space.copy() if point is None else point
        self.buffers = passes.statistics.copies()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module is the reference, without gradients.

        Raises:
            ModelError: a pass is going on.
        """
        passes, space = self.passes, self.passes.space
        if space.collecting:
            raise ModelError("method: asks its frozen reference inside a pass; ask it before the pass begins")
        with ExitStack() as stack:
            stack.enter_context(borrowed_random(space.device))
            stack.enter_context(passing(space.model, space.device, passes.precision, training=False))
            stack.enter_context(passes.statistics.at(self.buffers))
            stack.enter_context(passes.statistics.frozen())
            stack.enter_context(space.at(self.point))
            stack.enter_context(torch.no_grad())
            seed_torch(derive(passes.seed, passes.step, "frozen"), space.device)
            yield

    def logits(self, batch: Any) -> Tensor:
        """Its logits, shape (n, classes), one row a target."""
        with self.in_place():
            return self.passes.spare.run(lambda: logits_and_targets(self.passes.forward, batch)[0], batch)

    def uphill(self, batch: Any, loss: Callable[[Any, Any], Tensor], epsilon: float) -> Any:
        """The batch with its floating-point inputs moved along the sign of the gradient of a loss.

        Args:
            batch: the batch; inputs that are not floating point, or that the loss does not depend on, stay.
            loss: `(model, batch) -> scalar`.
            epsilon: how far, in standard deviations of the input over the batch.
        """
        inputs, targets = split(batch)
        named: dict[Any, Any] = dict(inputs) if isinstance(inputs, Mapping) else {None: inputs}
        leaves = {name: value.detach().requires_grad_() for name, value in named.items() if _floating(value)}
        if not leaves:
            return batch

        def attempt() -> tuple[Tensor | None, ...]:
            # copies, since the first thing that a model does may be done in place, which a leaf does not bear
            inputs = {name: leaf.clone() for name, leaf in leaves.items()}
            value = loss(self.passes.forward, _with(batch, named | inputs, targets))
            return torch.autograd.grad(value, list(leaves.values()), allow_unused=True)

        with self.in_place(), torch.enable_grad():
            slopes = self.passes.spare.run(attempt, batch)
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
            if slope is not None:
                here = leaf.detach()
                named[name] = here + epsilon * here.std(correction=0) * slope.sign()
        return _with(batch, named, targets)


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _with(batch: Any, named: dict[Any, Any], targets: Any) -> Any:
    """A batch with other inputs, of the form that it had."""
    if isinstance(batch, Mapping):
        return {**batch, **named}
    return (named if isinstance(batch[0], Mapping) else named[None]), targets
