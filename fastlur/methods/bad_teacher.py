"""Bad teacher: learn ignorance on the forget data, and one's own former answers on the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlur.fresh import reinitialise
from fastlur.frozen import Frozen
from fastlur.losses import distillation
from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.passes import Passes


@dataclass(frozen=True)
class BadTeacher(Recipe):
    """Imitate a teacher that knows nothing on the forget data, and the model as given on the retain data.

    Rule: descend along ∇[T² KL(θ₀/T ‖ θ/T) on the retain batch + λ T² KL(ignorant/T ‖ θ/T) on the forget batch].

    The ignorant teacher is the same network with its moving parameters drawn anew by their modules'
    `reset_parameters`, and their entries shuffled where a module has none; weights that do not move are shared. It
    costs a vector and no second module. Both teachers answer in eval mode. The labels of the retain data are not used.

    Source: Chundawat et al., "Can Bad Teaching Induce Forgetting?", arXiv 2205.08096, where items of both sets share a
    batch; here each side has its own mean, and λ says how they weigh.

    Args:
        forget_weight: λ ≥ 0. The answers of a net that knows nothing are nearly uniform and pull weakly towards any
            other class; with λ = T = 1 a class of digits stayed recognised.
        temperature: T > 0.

    Raises:
        ArgumentError: a value out of range.
    """

    forget_weight: float = 2.5
    temperature: float = 2.0

    name: ClassVar[str] = "bad_teacher"
    caveat: ClassVar[str] = (
        "The answers imitate a model that knows nothing; features from which the forget items can be told apart may "
        "stay below the last layer. Approximate, without a certificate of deletion."
    )
    own_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("forget_weight", self.forget_weight, example=2.5)
        check_range("temperature", self.temperature, low=1e-3, high=1e3, example=2.0)

    @property
    def cost(self) -> Cost:
        """Two passes, a forward of each teacher; two gradients and the two teachers."""
        return Cost(passes=2, forwards=2, buffers=4)

    def prepare(self, passes: Passes) -> Teachers:
        """Keep the model as given, and make one that knows nothing."""
        return Teachers(passes)

    def direction(self, passes: Passes, state: Teachers) -> Direction:
        """The two imitations."""
        good = state.good.logits(passes.batch("retain"))
        bad = state.bad.logits(passes.batch("forget"))
        passes.gradient("retain", state.retain, loss=distillation(good, self.temperature), weight=1.0)
        passes.gradient("forget", state.forget, loss=distillation(bad, self.temperature))
        return Direction(state.retain, state.forget)


class Teachers(Gradients):
    """The gradients of a step, and the two teachers."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        self.good = Frozen(passes)
        ignorant = passes.space.copy()
        with passes.statistics.at(self.good.buffers):
            reinitialise(passes, ignorant, shuffle=True)
            self.bad = Frozen(passes, ignorant)
