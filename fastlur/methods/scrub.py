"""SCRUB: away from the teacher on the forget data, close to it on the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastlur.errors import ArgumentError
from fastlur.frozen import Frozen
from fastlur.losses import ABOVE_CHANCE, Remembering, divergence, logits_and_targets
from fastlur.methods.base import Cost, Direction, Gradient, Recipe, check_range
from fastlur.passes import Passes, Which


@dataclass(frozen=True)
class SCRUB(Recipe):
    """Drive the model away from its former self on the forget data, and hold it there on the retain data.

    Rule, with the model as given for a teacher, D = T² KL(teacher/T ‖ student/T) and two kinds of steps:

        max-step:  descend along −∇ min(D_f, cap)         on the forget batch
        min-step:  descend along ∇(α D_r + γ L_r)         on the retain batch

    Published, an epoch of max-steps over the forget set comes before each of the first epochs of min-steps over the
    retain set. A step here has one update, so the alternation goes by steps: in the first `max_part` of the run steps
    k, 2k, 3k, … are max-steps, k = `max_every`, and all others are min-steps; the rest of the run is min-steps alone,
    which repair. A min-step comes first because D_f has no gradient at the teacher itself, apart from dropout and batch
    norm: with k = 1 the first max-step does nothing on a model without these. k stands for (1 + retain batches/forget
    batches) of the published epochs. Momentum carries over from one kind to the other. In a loop of unknown length the
    first part never ends. Where it is shorter than k its last step, or else the second of the run, is a max-step.

    The teacher answers in eval mode. A step of one kind makes no pass over the other side, whose loss is then missing
    (NaN) in the history; "retain_loss" is the whole of α D_r + γ L_r, "forget_loss" −min(D_f, cap). The norm of the
    direction stands in "retain_norm".

    Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880, for the objective. Published
    values of α, γ and T vary between tasks and repositories (0.001, 0.99 and 4 for one); the defaults are ours, as is
    the cap.

    Args:
        alpha: α ≥ 0, the factor on the distillation of the retain data.
        gamma: γ ≥ 0, the factor on their own loss.
        temperature: T > 0.
        max_part: the part of the run, in [0, 1], that has max-steps.
        max_every: k ≥ 1; 1 makes every step of that part a max-step.
        cap: nats of D_f, > 0; None: log(classes) + 10, all of it times T.

    Raises:
        ArgumentError: a value out of range.
    """

    alpha: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0
    max_part: float = 0.7
    max_every: int = 4
    cap: float | None = None

    name: ClassVar[str] = "scrub"
    caveat: ClassVar[str] = (
        "The answers were driven away from the former ones; features from which the forget items can be told apart "
        "may stay below the last layer. Approximate, without a certificate of deletion."
    )
    own_objective: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"method": {"alpha": 0.001, "gamma": 0.99, "temperature": 4.0}}
    }

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, example=1.0)
        check_range("gamma", self.gamma, example=1.0)
        check_range("temperature", self.temperature, low=1e-3, high=1e3, example=4)
        check_range("max_part", self.max_part, high=1.0, example=0.7)
        if not isinstance(self.max_every, int) or isinstance(self.max_every, bool) or self.max_every < 1:
            raise ArgumentError(f"max_every={self.max_every!r} must be a whole number ≥ 1, such as 4")
        if self.cap is not None:
            check_range("cap", self.cap, low=1e-6, example=12)

    @property
    def cost(self) -> Cost:
        """One pass, the teacher's forward; the gradient and the teacher."""
        return Cost(passes=1, forwards=1)

    def prepare(self, passes: Passes) -> Taught:
        """Keep the model as given."""
        return Taught(passes)

    def direction(self, passes: Passes, state: Taught) -> Direction:
        """A max-step's or a min-step's gradient."""
        side: Which = "forget" if self.is_max_step(passes.step, passes.steps) else "retain"
        teacher = state.teacher.logits(passes.batch(side))

        def away(model: Any, batch: Any) -> Tensor:
            logits, targets = logits_and_targets(model, batch)
            distance = divergence(teacher, logits, targets, self.temperature)
            cap = self.temperature * (math.log(logits.shape[-1]) + ABOVE_CHANCE) if self.cap is None else self.cap
            return -torch.where(distance > cap, distance.new_full((), cap), distance)

        def close(model: Any, batch: Any) -> Tensor:
            once = Remembering(model, passes.statistics.frozen)
            own = passes.losses["retain"](once, batch)
            return self.gamma * own + self.alpha * divergence(
                teacher, *logits_and_targets(once, batch), self.temperature
            )

        passes.gradient(side, state.gradient, loss=away if side == "forget" else close, weight=1.0)
        return Direction(state.gradient)

    def is_max_step(self, step: int, steps: int | None) -> bool:
        """Whether step number `step`, from 1, of `steps` is a max-step."""
        if steps is None:
            return step % self.max_every == 0
        last = round(self.max_part * steps)
        if self.max_part and steps > 1 and last < self.max_every:  # or a short run would not forget, unseen
            return step == max(last, 2)
        return step <= last and step % self.max_every == 0


class Taught(Gradient):
    """The gradient of a step, and the model as it was given."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        self.teacher = Frozen(passes)
