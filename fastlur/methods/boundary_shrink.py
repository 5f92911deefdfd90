"""Boundary shrinking: give the forget data to their nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastlur.errors import DataError
from fastlur.frozen import Frozen
from fastlur.losses import IGNORED, cross_entropy, logits_and_targets, split
from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.passes import Passes
from fastlur.task import CLASSIFICATION


@dataclass(frozen=True)
class BoundaryShrink(Recipe):
    """Teach every forget item the class across its nearest decision boundary.

    Rule: y' = the likeliest class other than y, in the model as given, at x + ε·s·sign(∇ₓ CE(x, y)), s the standard
    deviation of the inputs of the batch; descend along w ∇L_r + λ ∇CE(θ; x, y') .

    Inputs that are not floating point (tokens) have no gradient: their y' is the likeliest other class at x itself.
    The step ε is in units of the data's spread and is not clipped to a range of pixels, which is not known here.

    Source: Chen et al., "Boundary Unlearning", arXiv 2303.11570, where only the forget data are trained on (w = 0), for
    a few small steps, and ε = 0.1 of the range of pixels, which the preset leaves at the default: ε here is in
    another unit. How few and how small is ours, in the preset too: on digits its 20 steps cost 5 % of the other classes
    for less than half of one, 1 % for most of the mislabelled images, and those of `unlearn` half of everything. The
    retain term is ours.

    Args:
        epsilon: ε ≥ 0.
        forget_weight: λ ≥ 0.
        retain_weight: w ≥ 0; 0 leaves the pass over the retain batch out.

    Raises:
        ArgumentError: a value out of range. DataError: the model has one class only.
    """

    epsilon: float = 0.3
    forget_weight: float = 1.0
    retain_weight: float = 1.0

    name: ClassVar[str] = "boundary_shrink"
    caveat: ClassVar[str] = (
        "The answers were moved elsewhere; features from which the forget items can be told apart may stay below the "
        "last layer. Approximate, without a certificate of deletion."
    )
    own_objective: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION,)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"method": {"retain_weight": 0.0}, "lr": 3e-3, "steps": 20}
    }

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, example=0.3)
        check_range("forget_weight", self.forget_weight, example=1.0)
        check_range("retain_weight", self.retain_weight, example=1.0)

    @property
    def cost(self) -> Cost:
        """The passes of the step, the input's gradient and the neighbour's forward; the gradients and the model."""
        retained = self.retain_weight > 0
        return Cost(passes=3 if retained else 2, forwards=1, buffers=3)

    def prepare(self, passes: Passes) -> Shrinking:
        """Keep the model as given."""
        return Shrinking(passes)

    def direction(self, passes: Passes, state: Shrinking) -> Direction:
        """Retaining, and the neighbours' labels on the forget batch."""
        neighbours = nearest_classes(state.given, passes.batch("forget"), self.epsilon)

        def relabelled(model: Any, batch: Any) -> Tensor:
            logits, _ = logits_and_targets(model, batch)
            return cross_entropy(lambda _: logits, (None, neighbours))

        if self.retain_weight:
            passes.gradient("retain", state.retain, weight=self.retain_weight)
        passes.gradient("forget", state.forget, loss=relabelled)
        return Direction(state.retain, state.forget) if self.retain_weight else Direction(state.forget)


def nearest_classes(model: Frozen, batch: Any, epsilon: float) -> Tensor:
    """The likeliest wrong class of every item a step uphill, shape (n,); −100 where the item does not count.

    Raises:
        DataError: there is no other class.
    """
    batch = model.uphill(batch, cross_entropy, epsilon)
    targets = split(batch)[1].reshape(-1)
    logits = model.logits(batch)
    if logits.shape[-1] < 2:
        raise DataError(f"model: has {logits.shape[-1]} logit; a neighbour needs at least two classes")
    true = torch.nn.functional.one_hot(targets.clamp(min=0), logits.shape[-1]).bool()
    found = logits.masked_fill(true, -torch.inf).argmax(-1)
    return torch.where(targets == IGNORED, targets, found)


class Shrinking(Gradients):
    """The gradients of a step, and the model as it was given."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        self.given = Frozen(passes)
