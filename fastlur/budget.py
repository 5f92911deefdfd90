"""The retain budget: stop, and go back, when keeping costs more than the caller allows."""

from __future__ import annotations

from typing import Any

import torch

from fastlur.errors import ArgumentError
from fastlur.loop import StepEvent
from fastlur.passes import Loss
from fastlur.space import ParameterSpace
from fastlur.world import borrowed_random, mode, seed_torch

CHECK_EVERY = 10


class RetainBudget:
    """An observer that ends the run once the retain loss has risen by more than `limit`, at the last good state.

    The loss is the mean over fixed retain batches, in eval mode, looked at every 10 steps (and before every
    checkpoint); "risen" is against the model as given. At each look within the budget the weights and buffers are
    remembered, one copy of them; on the first one outside they are put back.

    Args:
        space: the moving parameters.
        loss: the retain loss.
        batches: what it is measured on, on the model's device.
        limit: the largest increase allowed, ≥ 0, in the units of the loss.

    Raises:
        ArgumentError: limit is negative or not a number.
    """

    def __init__(self, space: ParameterSpace, loss: Loss, batches: list[Any], limit: float, also_every: int) -> None:
        if not (isinstance(limit, int | float) and limit >= 0):
            raise ArgumentError(f"max_retain_loss_increase={limit!r} must be a number ≥ 0, or None for no budget")
        self.space, self.loss, self.batches, self.limit, self.also_every = space, loss, batches, limit, also_every
        self.baseline = self.measure()
        self.remember()

    def measure(self) -> float:
        """Mean retain loss now."""
        model, device = self.space.model, self.space.device
        with borrowed_random(device), mode(model, False), torch.no_grad():
            seed_torch(0, device)
            return sum(float(self.loss(model, batch)) for batch in self.batches) / len(self.batches)

    def remember(self) -> None:
        """Take the state to go back to."""
        self._weights = [flat.clone() for flat in self.space.theta.flats]
        self._buffers = [buffer.clone() for buffer in self.space.model.buffers()]

    def resume(self, baseline: float) -> None:
        """Go on with the baseline of an interrupted run, from the state it was brought back to."""
        self.baseline = baseline
        self.remember()

    def __call__(self, event: StepEvent) -> str | None:
        """Look, if it is time to; a text ends the run."""
        if event.step % CHECK_EVERY and event.step % self.also_every and event.step != event.steps:
            return None
        now = self.measure()
        if now <= self.baseline + self.limit:
            self.remember()
            return None
        with torch.no_grad():
            torch._foreach_copy_(self.space.theta.flats, self._weights)
            for buffer, before in zip(self.space.model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
        return (
            f"retain loss rose from {self.baseline:.4g} to {now:.4g}, more than max_retain_loss_increase="
            f"{self.limit:g}; rolled back to the last state within the budget"
        )
