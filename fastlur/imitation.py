"""A forget loss with a target: answer as another network does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlur.answers import Answers
from fastlur.errors import ArgumentError
from fastlur.identity import model_digest
from fastlur.losses import divergence, logits_and_targets
from fastlur.methods.base import check_range
from fastlur.microbatch import alike
from fastlur.world import mode

NOT_TRUE = -1e4  # a logit over T whose probability is 0 in every precision, and still finite


class Imitation:
    """T² · KL(q_T ‖ p_T) in nats, q ∝ teacher's probabilities to a power: answer as another network does.

    At T = 1 a model that is about right hardly feels how sure it is to be: between 0.99 and 0.999 of the true class
    there is nearly no gradient. At a higher T (q_T, p_T ∝ q^(1/T), p^(1/T)) its logits are drawn to those of q. The
    form is that of Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        teacher: a classifier with the classes of the model; asked in eval mode, never changed. Or its `Answers`.
        sharpness: the power, ≥ 0; 1: as the teacher says, 0: any answer is as good as another.
        without_truth: leave the true class out of q.
        weight: a factor on it, > 0, beside the method's own `forget_weight`.
        temperature: T, from 1e-3 to 1e3; with the factor T² the gradient does not fade as T grows.

    Raises:
        ArgumentError: a value out of range, or no module.
    """

    def __init__(
        self,
        teacher: nn.Module | Answers,
        sharpness: float = 1.0,
        without_truth: bool = False,
        weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        if not isinstance(teacher, nn.Module | Answers):
            raise ArgumentError(f"teacher: a {type(teacher).__name__} is no torch.nn.Module")
        check_range("sharpness", sharpness, example=2.0)
        check_range("weight", weight, low=1e-6, example=1.0)
        check_range("temperature", temperature, low=1e-3, high=1e3, example=2.0)
        self.teacher, self.sharpness, self.without_truth = teacher, sharpness, without_truth
        self.weight, self.temperature = weight, temperature

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Mean over the batch, shape ()."""
        logits, targets = logits_and_targets(model, batch)
        known = None
        if isinstance(self.teacher, Answers):
            wanted, known = self.teacher.of(batch)
        else:
            with torch.no_grad(), mode(self.teacher, False):
                wanted, _ = logits_and_targets(alike(model, self.teacher), batch)
        wanted = wanted.float() * self.sharpness
        if self.without_truth:
            wanted = wanted.scatter(-1, targets.clamp(min=0)[:, None], NOT_TRUE * self.temperature)
        loss = self.weight * divergence(wanted, logits, targets, self.temperature)
        return loss if known is None else torch.where(known, loss, torch.nan)

    def __repr__(self) -> str:
        more = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        whose = model_digest(self.teacher) if isinstance(self.teacher, nn.Module) else "answers"
        return f"Imitation({whose}, {more})"

    def settings(self) -> dict[str, float]:
        """Its arguments but for the teacher, by name."""
        return {name: getattr(self, name) for name in ("sharpness", "without_truth", "weight", "temperature")}
