"""Fine-tuning: training on without the forget data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlur.methods.base import Cost, Direction, Gradient, Recipe
from fastlur.passes import Passes


@dataclass(frozen=True)
class FineTune(Recipe):
    """Train on with the retain data alone and trust that the rest fades.

    Rule: descend along ∇L_r. The forget data are passed through the model by a trim or a mask alone, if there is one.
    It is the weakest of the baselines: nothing but drift takes what is to be forgotten away, and how much of it is a
    matter of the learning rate. On digits a class and mislabelled images were gone at lr = 1 and hardly touched at the
    usual 0.03, which is kept for models that would not survive the former.

    Source: the baseline of that name in the literature, as in Warnecke et al. and in SalUn's comparison (arXiv
    2310.12508).
    """

    name: ClassVar[str] = "fine_tune"
    caveat: ClassVar[str] = (
        "Nothing here pushes the forget data out: what the retain data do not overwrite stays. Approximate, without a "
        "certificate of deletion."
    )
    own_objective: ClassVar[bool] = True
    uses_forget: ClassVar[bool] = False

    @property
    def cost(self) -> Cost:
        """One pass and its gradient."""
        return Cost(passes=1, buffers=1)

    def prepare(self, passes: Passes) -> Gradient:
        """Room for the gradient."""
        return Gradient(passes)

    def direction(self, passes: Passes, state: Gradient) -> Direction:
        """∇L_r."""
        passes.gradient("retain", state.gradient)
        return Direction(state.gradient)
