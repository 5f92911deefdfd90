"""What a step saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepStats:
    """What a step saw, as 0-d tensors on the model's device: `float(...)` of one waits for it.

    Attributes:
        step: its number, from 1.
        forget_loss: unweighted, where the rule first evaluated it in this step (at the displaced point for
            "retain_first").
        retain_loss: unweighted, likewise (at θ, but displaced for "optimistic", whose only retain pass is there).
        dots: (⟨r,f⟩, ‖r‖², ‖f‖²) of the retaining half r and the forgetting half f of the direction, float64.
    """

    step: int
    forget_loss: Tensor
    retain_loss: Tensor
    dots: Tensor

    @property
    def cosine(self) -> Tensor:
        """Cosine between the two halves of the direction, in [−1, 1]; 0 where one of them vanishes."""
        scale = (self.dots[1] * self.dots[2]).sqrt()
        return torch.where(scale > 0, self.dots[0] / scale, torch.zeros_like(scale)).clamp(-1, 1)

    @property
    def retain_norm(self) -> Tensor:
        """Norm of the retaining half."""
        return self.dots[1].sqrt()

    @property
    def forget_norm(self) -> Tensor:
        """Norm of the forgetting half, the forget weight included."""
        return self.dots[2].sqrt()

    def numbers(self) -> Tensor:
        """[forget_loss, retain_loss, cosine, forget_norm, retain_norm], float64, still on the device."""
        losses = self.forget_loss.double(), self.retain_loss.double()
        return torch.stack((*losses, self.cosine, self.forget_norm, self.retain_norm))


FIELDS = ("forget_loss", "retain_loss", "cosine", "forget_norm", "retain_norm")
