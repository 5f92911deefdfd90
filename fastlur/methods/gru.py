"""GRU: gradient rectified unlearning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastlur import ops
from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.passes import Passes
from fastlur.space import Vector


@dataclass(frozen=True)
class GRU(Recipe):
    """Take from the forget gradient what points against a running average of the retain gradient.

    Rule, with r = ∇L_r, f = λ∇L_f and an average that begins at 0:

        a ← βa + (1 − β)r;    where ⟨f, a⟩ < 0:  f ← f − ⟨f, a⟩/‖a‖² · a;    descend along w·r + f.

    Only the direction of a matters, so it is kept up to the factor 1 − β. The average costs a vector, and a checkpoint
    holds it. As the average begins with r, the first update is that of `pcgrad` where the gradients are not in
    conflict; where they are, r stays whole here.

    Source: Wang et al., "GRU: Mitigating the Trade-off between Unlearning and Retention for LLMs", arXiv 2503.09117,
    and the authors' code, where w is 0 or a coefficient, and 1 − β is 0.6 to 0.99. With w = 0 nothing but the
    projection keeps what is to be kept, and that holds to first order and against the average only: on digits that was
    enough to forget a class, and cost up to two fifths of the rest when mislabelled images had to go. Hence the
    default.

    Args:
        forget_weight: λ ≥ 0, the factor on the forget loss.
        decay: β in [0, 1).
        retain_weight: w ≥ 0, how much of the retain gradient joins the direction.

    Raises:
        ArgumentError: a value out of range.
    """

    forget_weight: float = 0.2
    decay: float = 0.4
    retain_weight: float = 1.0

    name: ClassVar[str] = "gru"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {"method": {"retain_weight": 0.0}}}

    def __post_init__(self) -> None:
        check_range("forget_weight", self.forget_weight, example=0.2)
        check_range("decay", self.decay, high=0.9999, example=0.4)
        check_range("retain_weight", self.retain_weight, example=1.0)

    @property
    def cost(self) -> Cost:
        """Two passes, their gradients and the average."""
        return Cost(passes=2, buffers=3, adds=True)

    def prepare(self, passes: Passes) -> Averaged:
        """Room for the gradients, and an average of nothing."""
        return Averaged(passes)

    def direction(self, passes: Passes, state: Averaged) -> Direction:
        """The retain gradient and the rectified forget gradient."""
        passes.gradient("retain", state.retain, weight=self.retain_weight or 1.0)  # a factor leaves a's direction alone
        passes.gradient("forget", state.forget)
        average = state.average
        ops.displace(average.flats, state.retain.flats, average.flats, -self.decay)  # a ← r + βa
        dots, _ = ops.grad_dot(average.flats, state.forget.flats)
        ops.project(average.flats, state.forget.flats, dots, "one_sided")
        return Direction(state.retain, state.forget) if self.retain_weight else Direction(state.forget)


class Averaged(Gradients):
    """The gradients of a step, and the average that the next one needs."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        self.average = passes.space.vector()

    def vectors(self) -> dict[str, Vector]:
        """The average."""
        return {"average": self.average}
