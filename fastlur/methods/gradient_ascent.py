"""Gradient ascent on the forget data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastlur import ops
from fastlur.errors import ArgumentError, DataError
from fastlur.losses import bounded, logits_and_targets, negative_cross_entropy
from fastlur.methods.base import BYTE, Cost, Direction, Gradient, Recipe, check_range
from fastlur.passes import Loss, Passes


@dataclass(frozen=True)
class GradientAscent(Recipe):
    """Climb the loss of the forget data alone, until they are guessed or the retain data suffer.

    Rule: descend along ∇L_f. The published L_f is −cross-entropy, and nothing ends the climb: it ruins any model in the
    end. The default has three brakes, all decided on the device:

        L_f = −min(cross-entropy, log(classes)), so that it ends where the forget batch is at the level of guessing;
        ‖∇L_f‖ is cut to `max_norm`, since the gradient explodes as soon as the loss leaves the floor;
        once the retain loss of a step's batch is more than `max_rise` above that of the first, nothing moves any more.

    The brakes keep a model from being ruined unseen, they do not make a good method of it: on digits a class went at
    the price of 6 to 15 % of the others, but of mislabelled images only half went, at 8 to 10 %.
    Passes run in eval mode, so that losses are those of the finished model; statistics of normalisation stay. The norm
    of the direction stands in `history["retain_norm"]`.

    Source: the baseline of that name in the literature (SalUn's comparison, arXiv 2310.12508); the brakes are ours.

    Args:
        bounded: False: the published form without a brake. A `forget_loss` given to `unlearn` replaces L_f only.
        max_norm: the longest gradient, > 0.
        max_rise: nats ≥ 0 that the retain loss may rise.

    Raises:
        ArgumentError: a value out of range.
    """

    bounded: bool = True
    max_norm: float = 0.1
    max_rise: float = 0.2

    name: ClassVar[str] = "gradient_ascent"
    caveat: ClassVar[str] = (
        "The loss of the forget items was driven up, which can be undone by a few steps on some of them, and retain "
        "data were not trained on. Approximate, without a certificate of deletion."
    )
    training: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.bounded, bool):
            raise ArgumentError(f"bounded={self.bounded!r} must be True or False")
        check_range("max_norm", self.max_norm, low=1e-12, example=0.1)
        check_range("max_rise", self.max_rise, example=0.2)

    @property
    def cost(self) -> Cost:
        """One pass and its gradient, and the look at the retain loss."""
        masks = forwards = int(self.bounded)
        return Cost(passes=1, forwards=forwards, buffers=1 + masks * BYTE, masks=masks, adds=True)

    def default_forget_loss(self, task: str) -> Loss:
        """Ascent up to the loss of guessing, or without an end."""
        return UpToGuessing() if self.bounded else negative_cross_entropy

    def prepare(self, passes: Passes) -> Gradient:
        """Room for the gradient, and for the brakes."""
        return Braked(passes) if self.bounded else Gradient(passes)

    def direction(self, passes: Passes, state: Gradient) -> Direction:
        """∇L_f, as far as the brakes let it go."""
        if not isinstance(state, Braked):
            passes.gradient("forget", state.gradient)
            return Direction(state.gradient)
        passes.values["retain"] = passes.value("retain")
        state.look(passes.values["retain"], self.max_rise)
        passes.gradient("forget", state.gradient)
        vector = state.gradient.flats
        norm2 = ops.grad_dot(vector, vector)[0][0]
        ops.displace(vector, vector, vector, 1 - (self.max_norm * norm2.rsqrt()).clamp(max=1.0))
        return Direction(state.gradient, mask=state.free)


class Braked(Gradient):
    """The gradient of a step, the retain loss of the first one, and whether the climb goes on.

    It ends by a mask over everything: a gradient of 0 would leave momentum to go on, which is most of the damage.
    """

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        self.free = passes.space.vector(torch.bool)
        self._climb = torch.tensor([math.nan, 1.0], dtype=torch.float64, device=passes.space.device)

    def look(self, retain_loss: Tensor, max_rise: float) -> None:
        """Let everything move while the retain loss is not too high, and nothing from then on."""
        first, going = self._climb.unbind()
        first.copy_(torch.where(first.isnan(), retain_loss, first))
        going.mul_(retain_loss <= first + max_rise)
        for flat in self.free.flats:
            flat.fill_(going > 0)

    def tensors(self) -> dict[str, Tensor]:
        """The two numbers."""
        return {"climb": self._climb}


class UpToGuessing:
    """−min(mean cross-entropy of the batch, log(classes)): ascent with an end at the loss of a uniform guess."""

    def __call__(self, model: object, batch: object) -> Tensor:
        """Shape ()."""
        logits, targets = logits_and_targets(model, batch)
        if logits.shape[-1] < 2:
            raise DataError(f"model: has {logits.shape[-1]} logit; guessing needs at least two classes")
        return bounded(logits, targets, math.log(logits.shape[-1]))

    def __repr__(self) -> str:
        return "UpToGuessing()"
