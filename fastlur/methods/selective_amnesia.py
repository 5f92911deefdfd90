"""Selective Amnesia: forget under a penalty that holds what mattered to the model as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.methods.components import check_batches
from fastlur.methods.importance import importance
from fastlur.methods.relabelling import wrong_label_loss
from fastlur.passes import Loss, Passes
from fastlur.space import Vector


@dataclass(frozen=True)
class SelectiveAmnesia(Recipe):
    """Teach know-nothing answers on the forget data while a Fisher-weighted penalty holds the weights in place.

    min_θ  L_s(forget) + γ CE(retain) + λ Σ F_i (θ_i − θ₀,i)², F being the diagonal of the Fisher information at the
    model as given, estimated by the mean over forget and retain batches of the squared gradient, in eval mode.

    Source: Heng & Soh, "Selective Amnesia", arXiv 2305.10120, which is about generative models. Reconstructed for
    classification: the surrogate L_s is the cross-entropy towards the uniform distribution over the wrong classes. It
    is bounded below, as a surrogate has to be, prefers no wrong answer, and is the expectation of random wrong labels
    without their noise. (With the true class among them, an item may keep it as the largest of almost equal
    probabilities: on digits a class so taught was still recognised.) Gradients are squared batch by batch.

    Args:
        retain_weight: γ ≥ 0.
        fisher_weight: λ ≥ 0. It multiplies squared gradients, which are tiny in a well-trained model: values in the
            tens or hundreds are ordinary.
        batches: batches a side for the Fisher information; None: all.

    Raises:
        ArgumentError: a value out of range.
        NonFiniteError: a gradient is not finite.
    """

    retain_weight: float = 1.0
    fisher_weight: float = 10.0
    batches: int | None = None

    name: ClassVar[str] = "selective_amnesia"
    measures_forget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("retain_weight", self.retain_weight, example=1.0)
        check_range("fisher_weight", self.fisher_weight, example=10.0)
        check_batches(self.batches)

    @property
    def cost(self) -> Cost:
        """A pass a side; two gradients, the Fisher diagonal and the weights as given."""
        return Cost(passes=2, buffers=4, note="once: a pass over forget and retain data for the Fisher information")

    def default_forget_loss(self, task: str) -> Loss:
        """The surrogate: cross-entropy towards all wrong classes alike."""
        return wrong_label_loss

    def prepare(self, passes: Passes) -> Amnesia:
        """Estimate the Fisher information and keep θ₀."""
        return Amnesia(passes, self.batches)

    def direction(self, passes: Passes, state: Amnesia) -> Direction:
        """γ∇CE(retain) and ∇L_s(forget); the penalty joins in the update."""
        passes.gradient("retain", state.retain, weight=self.retain_weight)
        passes.gradient("forget", state.forget)
        prox = 2 * self.fisher_weight  # the update's term is ½·prox·Σ F (θ − θ₀)²
        return Direction(state.retain, state.forget, prox=prox, theta0=state.theta0, fisher=state.fisher)


class Amnesia(Gradients):
    """The penalty's centre, which is the model as given, and its weights."""

    def __init__(self, passes: Passes, batches: int | None) -> None:
        fisher, mine = importance(passes, "forget", batches, "fisher")
        other, theirs = importance(passes, "retain", batches, "fisher")
        with torch.no_grad():  # the mean over the batches of both
            torch._foreach_lerp_(fisher.flats, other.flats, theirs / max(mine + theirs, 1))
            few_bits = [flat.dtype for flat in fisher.flats] != [flat.dtype for flat in passes.space.theta.flats]
            self.fisher = passes.space.vector() if few_bits else fisher
            if few_bits:  # as the update takes it
                torch._foreach_copy_(self.fisher.flats, fisher.flats)
        del other, fisher
        self.theta0 = passes.space.copy()
        super().__init__(passes)

    def vectors(self) -> dict[str, Vector]:
        """The weights: made again, they would be the same only where the device sums in one order."""
        return {"fisher": self.fisher}
