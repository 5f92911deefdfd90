"""The retain budget: stop, and go back, when keeping costs more than the caller allows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastlur.errors import ArgumentError, DataError, number
from fastlur.loop import StepEvent
from fastlur.passes import Loss
from fastlur.slots import Selection
from fastlur.snapshot import Snapshot
from fastlur.world import borrowed_random, mode, seed_torch

CHECK_EVERY = 10


class RetainBudget:
    """An observer that ends the run once the retain loss has risen by more than `limit`, at the last good state.

    The loss is the mean over fixed retain batches, each weighed by its items, in eval mode, looked at every 10 steps,
    before every checkpoint and at the end; "risen" is against the model as given, before anything that a method does to
    it beforehand, a trim say. At each look within the budget the weights and buffers are remembered, one copy of them;
    on the first one outside they are put back. So the model that a run leaves is within the budget, whatever the
    method.

    Args:
        model: as given.
        loss: the retain loss.
        batches: what it is measured on, on the model's device, and how many items each has.
        limit: the largest increase allowed, ≥ 0, in the units of the loss.
        also_every: look as well whenever so many steps are done.
        parameters: which may move.
        finishes: the method changes the model after the last step, and what it makes of a state within the budget may
            be outside; then there is only the model as given to go back to, of which a second copy is kept.

    Raises:
        ArgumentError: limit is negative or not a number.
        DataError: the loss of the model as given is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: list[tuple[Any, int]],
        limit: float,
        also_every: int,
        parameters: Selection = None,
        finishes: bool = False,
    ) -> None:
        check_limit(limit)
        self.model, self.loss, self.batches, self.limit, self.also_every = model, loss, batches, limit, also_every
        self._device = next(model.parameters()).device
        self.baseline = self.measure()
        if not math.isfinite(self.baseline):
            raise DataError(
                f"loss: is {self.baseline} on the retain data in eval mode, so max_retain_loss_increase={limit:g} has "
                "nothing to start from; look for NaN in the model's buffers, or leave it None"
            )
        self._good, self._when = Snapshot(model, parameters), "the model as given"
        self._given = Snapshot(model, parameters) if finishes else self._good
        self.finishes = finishes

    def measure(self) -> float:
        """Mean retain loss now, over the items."""
        with borrowed_random(self._device), mode(self.model, False), torch.no_grad():
            seed_torch(0, self._device)
            sums = [float(self.loss(self.model, batch)) * items for batch, items in self.batches]
            return sum(sums) / sum(items for _, items in self.batches)

    def resume(self, baseline: float, step: int) -> None:
        """Go on with the baseline of an interrupted run, from the state after a step that it was brought back to."""
        self.baseline = baseline
        self._keep(step)

    def __call__(self, event: StepEvent) -> str | None:
        """Look, if it is time to; a text ends the run."""
        if event.step % CHECK_EVERY and event.step % self.also_every and event.step != event.steps:
            return None
        now = self.measure()
        if now <= self.baseline + self.limit:
            self._keep(event.step)
            return None
        self._good.put_back()
        return self._over(now, self._when)

    def last(self) -> str | None:
        """Look at the finished model, which a method may have changed without a step; a text says why it was undone."""
        now = self.measure()
        if now <= self.baseline + self.limit:
            return None
        self._given.put_back()
        return self._over(now, self._when if self._given is self._good else "the model as given")

    def _keep(self, step: int) -> None:
        """Remember the model as it is after a step."""
        self._good.take()
        self._when = f"the state after step {step}, the last that was looked at and within the budget"

    def _over(self, now: float, to: str) -> str:
        return (
            f"retain loss rose from {self.baseline:.4g} to {now:.4g}, more than max_retain_loss_increase="
            f"{self.limit:g}; rolled back to {to}"
        )


def check_limit(limit: object, loss: object = None) -> None:
    """Refuse what is no budget, and a retain loss that there cannot be one on.

    Raises:
        ArgumentError: the limit is negative or not a number, or the loss is only made when the run begins.
    """
    if hasattr(loss, "prepare"):
        kind = type(loss).__name__
        raise ArgumentError(
            f"max_retain_loss_increase={limit!r}: a {kind} compares with the model as given, which is there only once "
            "the run begins; leave it None, and stop by a rule such as fastlur.stopping's"
        )
    if not number(limit) and not (isinstance(limit, float) and limit == math.inf):
        raise ArgumentError(f"max_retain_loss_increase={limit!r} must be a number ≥ 0, or None for no budget")
