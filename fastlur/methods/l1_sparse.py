"""L1-sparse: fine-tuning towards a sparse model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastlur.methods.base import Cost, Direction, Gradient, Recipe, check_range
from fastlur.passes import Passes


@dataclass(frozen=True)
class L1Sparse(Recipe):
    """Train on with the retain data under an L1 penalty that fades out.

    Rule: descend along ∇L_r + γ_t sign(θ), γ_t = γ(1 − t/T) in step t = 0 … T − 1: weights that the retain data do not
    hold up shrink towards 0. Where the number of steps is not known (a loop of your own) γ stays as it is. The forget
    data are passed through the model by a trim or a mask alone, if there is one.

    Source: Jia et al., "Model Sparsity Can Simplify Machine Unlearning", arXiv 2304.04934 (γ, and its linear decay).
    The published order of magnitude, 10⁻⁴, is for runs of thousands of steps; in a run of a hundred it does nothing
    to be seen, so that the preset has 1000 steps at lr 0.3, which are ours. The default is ours, for the 150 steps
    that `unlearn` makes where nothing is said: on digits these forgot a class and mislabelled images alike, half as
    many steps did not, and five times the γ ruined the model. How far weights shrink goes with lr · γ · steps / (1 −
    momentum).

    Args:
        gamma: γ ≥ 0, the factor of ‖θ‖₁ in the first step.

    Raises:
        ArgumentError: gamma is not a finite number ≥ 0.
    """

    gamma: float = 1e-2

    name: ClassVar[str] = "l1_sparse"
    caveat: ClassVar[str] = (
        "Nothing here pushes the forget data out: what the penalty and the retain data do not overwrite stays. "
        "Approximate, without a certificate of deletion."
    )
    own_objective: ClassVar[bool] = True
    uses_forget: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {"method": {"gamma": 1e-4}, "lr": 0.3, "steps": 1000}}

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, example=1e-2)

    @property
    def cost(self) -> Cost:
        """One pass and its gradient; the penalty is part of the update."""
        return Cost(passes=1, buffers=1)

    def prepare(self, passes: Passes) -> Gradient:
        """Room for the gradient."""
        return Gradient(passes)

    def direction(self, passes: Passes, state: Gradient) -> Direction:
        """∇L_r, and the penalty as the update's part."""
        passes.gradient("retain", state.gradient)
        done = 0.0 if passes.steps is None else (passes.step - 1) / passes.steps
        return Direction(state.gradient, l1=self.gamma * max(0.0, 1 - done))
