"""EUPMU: implicit gradient surgery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastlur.errors import ArgumentError
from fastlur.losses import IGNORED, logits_and_targets
from fastlur.methods.base import Cost, Direction, Gradient, Recipe, check_range
from fastlur.passes import ARGUMENT, Loss, Passes, Which
from fastlur.world import borrowed_random

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam, which moves w
LEAST = 1e-12  # of a loss under the logarithm: a model may be so sure that its loss rounds to 0

SUCH: dict[Which, str] = {
    "forget": "fastlur.methods.eupmu.MeanConfidence()",
    "retain": "fastlur.losses.cross_entropy",
}


@dataclass(frozen=True)
class EUPMU(Recipe):
    """Forget under a weight on retaining that grows while the retain loss rises, and falls while it falls.

    Rule: descend along ∇(log L_f + max(w, 0) log L_r), both losses positive, so that w compares relative changes. The
    projection that a bounded rise of L_r asks for is never computed: w, its multiplier, follows

        δ_t = log L_r(θ_{t−1}; B_t) − log L_r(θ_t; B_t) − ε,    w ← Adam(w; δ_t + γw, rate η),    w_0 = 0.

    Source: Zhou et al., "Efficient Utility-Preserving Machine Unlearning with Implicit Gradient Surgery", arXiv
    2510.22124, and the authors' code, whose η, γ and ε are the defaults. Two things are ours. The code evaluates the
    last step's batch again after the update; here the new step's batch B_t is evaluated at the last step's weights,
    which costs the same forward, needs one vector more and no batch to be kept, so that an interrupted run goes on bit
    for bit. And the forget loss: the published one is any positive one; the default here is `MeanConfidence`.

    Args:
        weight_lr: η ≥ 0, about how far w moves in a step, since Adam takes the size out.
        decay: γ ≥ 0, pulls w back to 0.
        required_fall: ε in [−1, 1], the relative fall of L_r a step below which w grows; negative allows a rise.

    Raises:
        ArgumentError: a value out of range, or a loss that is not positive (a retain loss may be 0: below 10⁻¹² losses
            count as that).
    """

    weight_lr: float = 0.025
    decay: float = 0.01
    required_fall: float = 0.0

    name: ClassVar[str] = "eupmu"

    def __post_init__(self) -> None:
        check_range("weight_lr", self.weight_lr, example=0.025)
        check_range("decay", self.decay, example=0.01)
        check_range("required_fall", self.required_fall, low=-1.0, high=1.0, example=0.0)

    @property
    def cost(self) -> Cost:
        """Two passes into one gradient, a forward at the last weights, and those."""
        return Cost(passes=2, forwards=1, buffers=2, adds=True)

    def default_forget_loss(self, task: str) -> Loss:
        """Mean confidence in the true class."""
        return MeanConfidence()

    def prepare(self, passes: Passes) -> Multiplier:
        """A weight of 0, and the last weights, which are the first.

        Raises:
            ArgumentError: a loss is not positive on a first batch.
        """
        with borrowed_random(passes.space.device):
            sides: tuple[Which, Which] = "forget", "retain"
            batches: dict[Which, Any] = {side: next(passes.feed.batches(side, limit=1)) for side in sides}
            with passes.aside(batches):
                for side in sides:
                    value = float(passes.value(side))
                    if not (value > 0 or (side == "retain" and value == 0)):
                        raise ArgumentError(
                            f"{ARGUMENT[side]}: is {value:.4g} on a first {side} batch; eupmu takes its logarithm and "
                            f"needs a positive loss, such as {SUCH[side]}"
                        )
        return Multiplier(passes)

    def direction(self, passes: Passes, state: Multiplier) -> Direction:
        """∇(log L_f + max(w, 0) log L_r), both terms in one vector."""
        before = logarithm(passes.value("retain", state.last).double())
        torch._foreach_copy_(state.last.flats, passes.space.theta.flats)
        seen: dict[Which, Tensor] = {}
        start = state.moments()

        def weighted(model: Any, batch: Any) -> Tensor:
            state.moments(start)  # so that a pass may be made again
            seen["retain"] = passes.losses["retain"](model, batch)
            log = logarithm(seen["retain"])
            state.move(before - log.detach().double() - self.required_fall, self.weight_lr, self.decay)
            return state.w.clamp(min=0).to(log.dtype) * log

        def forgetting(model: Any, batch: Any) -> Tensor:
            seen["forget"] = passes.losses["forget"](model, batch)
            return logarithm(seen["forget"])

        passes.gradient("retain", state.gradient, loss=weighted, weight=1.0)
        passes.gradient("forget", state.gradient, loss=forgetting, weight=1.0, add=True)
        passes.values.update({side: value.detach() for side, value in seen.items()})  # not their logarithms
        return Direction(state.gradient)


def logarithm(loss: Tensor) -> Tensor:
    """log of a loss of 10⁻¹² or more; flat below, and not a number below 0, where no loss for this method goes."""
    return torch.where(loss < 0, loss, loss.clamp(min=LEAST)).log()


class Multiplier(Gradient):
    """w, Adam's moments of it, and the weights before the last step."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        self.last = passes.space.copy()
        self._adam = torch.zeros(4, dtype=torch.float64, device=passes.space.device)

    @property
    def w(self) -> Tensor:
        """The weight on log L_r before it is cut off at 0, shape (), float64."""
        return self._adam[0]

    def moments(self, values: Tensor | None = None) -> Tensor:
        """A copy of w, its moments and their count, set to `values` first if there are any."""
        if values is not None:
            self._adam.copy_(values)
        return self._adam.clone()

    def move(self, change: Tensor, lr: float, decay: float) -> None:
        """One step of Adam, without waiting for the device."""
        w, first, second, count = self._adam
        gradient = change + decay * w
        count += 1
        first.mul_(BETA1).add_((1 - BETA1) * gradient)
        second.mul_(BETA2).add_((1 - BETA2) * gradient.square())
        away = (first / (1 - BETA1**count)) / ((second / (1 - BETA2**count)).sqrt() + EPS)
        w.sub_(lr * away)

    def vectors(self) -> dict[str, Any]:
        """The weights before the last step."""
        return {"last": self.last}

    def tensors(self) -> dict[str, Tensor]:
        """w, its two moments and their count."""
        return {"adam": self._adam}


class MeanConfidence:
    """1/classes + mean confidence in the true class: positive, bounded, and as good as flat below guessing.

    Its logarithm falls like −cross-entropy while items are known and stops falling once they are guessed, which is what
    keeps the ascent from running away.
    """

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Shape (), in (1/classes, 1 + 1/classes]."""
        logits, targets = logits_and_targets(model, batch)
        counts = (targets != IGNORED).to(torch.float32)
        chances = torch.softmax(logits.float(), dim=-1)
        right = chances.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        return 1 / logits.shape[-1] + (right * counts).sum() / counts.sum()

    def __repr__(self) -> str:
        return "MeanConfidence()"
