"""PCGrad: the symmetric projection of two conflicting gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlur import ops
from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.passes import Passes


@dataclass(frozen=True)
class PCGrad(Recipe):
    """Take from each of the two gradients what points against the other, then descend along both.

    Rule, with r = ∇L_r and f = λ∇L_f: where ⟨r, f⟩ < 0,

        r ← r − ⟨r, f⟩/‖f‖² · f,    f ← f − ⟨f, r⟩/‖r‖² · r    (both from the values before),

    then descend along r + f. The history shows the gradients after the projection; their cosine is then that of two
    vectors at the supplementary angle, positive where the gradients were in conflict. Without a conflict nothing is
    projected, and the first update is then that of `gru`.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782, for the two losses of unlearning.

    Args:
        forget_weight: λ ≥ 0, the factor on the forget loss.

    Raises:
        ArgumentError: forget_weight is not a finite number ≥ 0.
    """

    forget_weight: float = 0.2

    name: ClassVar[str] = "pcgrad"

    def __post_init__(self) -> None:
        check_range("forget_weight", self.forget_weight, example=0.2)

    @property
    def cost(self) -> Cost:
        """Two passes and their gradients, projected in place."""
        return Cost(passes=2, adds=True)

    def prepare(self, passes: Passes) -> Gradients:
        """Room for the gradients."""
        return Gradients(passes)

    def direction(self, passes: Passes, state: Gradients) -> Direction:
        """The two gradients without their conflict."""
        passes.gradient("retain", state.retain)
        passes.gradient("forget", state.forget)
        dots, _ = ops.grad_dot(state.retain.flats, state.forget.flats)
        ops.project(state.retain.flats, state.forget.flats, dots, "symmetric")
        return Direction(state.retain, state.forget)
