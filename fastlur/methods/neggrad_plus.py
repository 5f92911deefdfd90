"""NegGrad+: ascent on the forget data, descent on the retain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.passes import Passes


@dataclass(frozen=True)
class NegGradPlus(Recipe):
    """Descend on the retain loss and climb on the forget loss, mixed by one weight.

    Rule: descend along w ∇L_r + (1 − w) ∇L_f, where L_f = −cross-entropy up to a cap (`BoundedForgetting`), or the
    caller's own. One joint backward would do; two are taken so that the history has the cosine of the two.

    Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880 (as a baseline); the cap is ours.

    Args:
        retain_weight: w in [0, 1]; 1 is fine-tuning, 0 gradient ascent.

    Raises:
        ArgumentError: retain_weight is outside [0, 1].
    """

    retain_weight: float = 0.85

    name: ClassVar[str] = "neggrad_plus"

    def __post_init__(self) -> None:
        check_range("retain_weight", self.retain_weight, high=1.0, example=0.85)

    @property
    def cost(self) -> Cost:
        """Two passes and their gradients."""
        return Cost(passes=2)

    def prepare(self, passes: Passes) -> Gradients:
        """Room for the gradients."""
        return Gradients(passes)

    def direction(self, passes: Passes, state: Gradients) -> Direction:
        """The two terms."""
        passes.gradient("retain", state.retain, weight=self.retain_weight)
        passes.gradient("forget", state.forget, weight=1 - self.retain_weight)
        return Direction(state.retain, state.forget)
