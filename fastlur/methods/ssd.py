"""SSD: selective synaptic dampening, without a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastlur.errors import ArgumentError
from fastlur.methods.base import Cost, Recipe, State, check_range
from fastlur.methods.components import check_batches
from fastlur.methods.importance import importance
from fastlur.passes import Passes


@dataclass(frozen=True)
class SSD(Recipe):
    """Dampen the weights that matter much more to the forget than to the retain data; no training at all.

    D_f, D_r: diagonals of the Fisher information on the forget and the retain data, as means of squared gradients of
    the task's loss, in eval mode. Where D_f > αD_r: θ ← min(λ D_r / D_f, 1) θ.

    Source: Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", arXiv
    2308.07707. Reconstructed in two points: the second diagonal is taken over the retain data instead of all training
    data, which `unlearn` is not given as one set, and each item's gradient is squared, not each batch's: gradients of
    one class add up within a batch and those of mixed data cancel, and then α = 10 selects far too much.

    It suits data that are alike, such as a class. Wrong labels scattered over the classes touch what all items need: on
    digits no α forgot them and left the model alive.

    Args:
        alpha: α ≥ 0, how many times more important a weight must be to the forget data.
        dampening: λ ≥ 0; the smaller, the stronger is what is selected dampened.
        batches: batches a side that are looked at; None: all.
        group: items whose gradient is squared as one, ≥ 1, for that many times fewer passes; a larger one wants a
            larger α. None: whole batches.

    Raises:
        ArgumentError: a value out of range.
        NonFiniteError: a gradient is not finite; no weight has changed then.
    """

    alpha: float = 10.0
    dampening: float = 1.0
    batches: int | None = None
    group: int | None = 1

    name: ClassVar[str] = "ssd"
    caveat: ClassVar[str] = (
        "Weights were scaled down once by an estimate of their importance, and nothing was trained: what other "
        "weights hold of the forget items stays. Approximate, without a certificate of deletion."
    )
    own_objective: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    uses_forget: ClassVar[bool] = False
    measures_forget: ClassVar[bool] = True
    steps: ClassVar[int | None] = 0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, example=10.0)
        check_range("dampening", self.dampening, example=1.0)
        check_batches(self.batches)
        check_batches(self.group, "group")
        if self.mask is not None:
            raise ArgumentError(f"mask={self.mask!r}: SSD takes no steps for a mask to act on; leave it None")

    @property
    def cost(self) -> Cost:
        """No step; two importances and a gradient for a while."""
        return Cost(passes=0, buffers=3, note="once: a pass for every item, or every group of them", adds=True)

    @torch.no_grad()
    def prepare(self, passes: Passes) -> State:
        """All of it."""
        forget, _ = importance(passes, "forget", self.batches, self.name, self.group)
        retain, _ = importance(passes, "retain", self.batches, self.name, self.group)
        for theta, gone, kept in zip(passes.space.theta.flats, forget.flats, retain.flats, strict=True):
            factor = (kept * self.dampening / gone).clamp(max=1.0)
            theta.copy_(torch.where(gone > self.alpha * kept, theta * factor, theta))
        return State()
