"""What methods share that teach other answers in place of the true ones, and so have a bounded forget loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastlur.errors import DataError
from fastlur.losses import IGNORED, logits_and_targets
from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.passes import Loss, Passes
from fastlur.reference import wide


def random_labels(targets: Tensor, classes: int) -> Tensor:
    """A wrong class for every target, uniformly among the others; targets that do not count stay as they are.

    Raises:
        DataError: there is no other class.
    """
    if classes < 2:
        raise DataError(f"model: has {classes} logit; a wrong label needs at least two classes")
    wrong = (targets + torch.randint(1, classes, targets.shape, device=targets.device)) % classes
    return torch.where(targets == IGNORED, targets, wrong)


def random_label_loss(model: Any, batch: Any) -> Tensor:
    """Mean cross-entropy in nats towards random wrong labels, drawn anew for every batch of every step.

    Both passes of a side in one step draw the same labels, and so does a resumed run: a pass seeds its draws.
    """
    logits, targets = logits_and_targets(model, batch)
    return functional.cross_entropy(wide(logits), random_labels(targets, logits.shape[-1]))


def wrong_label_loss(model: Any, batch: Any) -> Tensor:
    """Mean cross-entropy in nats towards the uniform distribution over the wrong classes; at least log(classes − 1).

    The expectation of `random_label_loss` over its draws: the same aim without their noise.
    """
    logits, targets = logits_and_targets(model, batch)
    classes = logits.shape[-1]
    if classes < 2:
        raise DataError(f"model: has {classes} logit; a wrong label needs at least two classes")
    counts = targets != IGNORED
    logs = functional.log_softmax(wide(logits), -1)
    true = logs.gather(-1, torch.where(counts, targets, 0).unsqueeze(-1)).squeeze(-1)
    each = (true - logs.sum(-1)) / (classes - 1)
    return torch.where(counts, each, 0.0).sum() / counts.sum()


@dataclass(frozen=True)
class Relabelling(Recipe):
    """Retain loss and λ times the cross-entropy towards random wrong labels, side by side.

    Args:
        forget_weight: λ ≥ 0.

    Raises:
        ArgumentError: a value out of range.
    """

    forget_weight: float = 1.0

    own_objective: ClassVar[bool] = True
    caveat: ClassVar[str] = (
        "The model was taught wrong labels for the forget items, for which it has to recognise them: that they were "
        "forgotten may show. Approximate, without a certificate of deletion."
    )

    def __post_init__(self) -> None:
        check_range("forget_weight", self.forget_weight, example=1.0)

    @property
    def cost(self) -> Cost:
        """A pass a side, a gradient a side."""
        return Cost(passes=2, buffers=2)

    def default_forget_loss(self, task: str) -> Loss:
        """Cross-entropy towards random wrong labels."""
        return random_label_loss

    def prepare(self, passes: Passes) -> Gradients:
        """Allocate the two gradients."""
        return Gradients(passes)

    def direction(self, passes: Passes, state: Gradients) -> Direction:
        """∇CE(retain) and λ∇CE(forget, random)."""
        passes.gradient("retain", state.retain)
        passes.gradient("forget", state.forget)
        return Direction(state.retain, state.forget)
