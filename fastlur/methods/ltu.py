"""LTU: learning to unlearn from what a few retained items and membership attacks tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from fastlur import content, meta, ops
from fastlur.data import source, to_device
from fastlur.errors import ArgumentError, DataError, nearest, told, unknown
from fastlur.losses import IGNORED, logits_and_targets, wide
from fastlur.membership import Attackers, features
from fastlur.methods.base import Cost, Direction, Recipe, State, check_range
from fastlur.passes import Loss, Passes, Which
from fastlur.space import Vector
from fastlur.world import borrowed_random, derive

Harmonization = Literal["one_sided", "symmetric", "none"]
Rule = Literal["first_order", "secant"]
RELATIVE_DEFAULT = 0.1
AUDITED = 16  # retain batches that the attacks are fitted to
NOISE = 0.05, 0.1, 0.15, 0.2, 0.3, 0.4  # relative; a model so disturbed answers as if it had not seen its items
BATCH = 128
DRAW = "ltu"  # what the retain batches are drawn by that are looked at, and held where only some are used


@dataclass(frozen=True)
class LTU(Recipe):
    """Unlearn along feedback that holds beyond what it was tuned on: of retained classes and of membership attacks.

    Each step has, for either side, a meta-tune and a meta-test; α is the inner step:

        A(θ) + B(θ − α∇A(θ))     remember: A, B = half the cross-entropy on one and the other half of the classes of a
                                 retain batch
                                 forget: A, B = λ/2 times how surely one and the other half of the attacks call the
                                 forget batch members, mean log(1 + odds)

    with the halves drawn anew in each step; then the meta-update along g_r + g_f, the gradients of both, after
    harmonization: where ⟨g_r, g_f⟩ < 0, g_f gives up its part against g_r ("symmetric": g_r its part against g_f, too).

    The attacks are small networks on the model's outputs, fitted once before the first step: members are retained
    items, judged by the model as given; strangers are `nonmembers`, or, where there are none, the same items judged by
    the model with every weight multiplied by 1 + ρξ, ξ normal, ρ from 0.05 to 0.4. That shadow needs no data, but is an
    assumption about how a model answers what it has not seen; held-out data are better.

    Passes run in eval mode and the normalisation statistics stay as given: attacks judge the model as it will be used,
    and a few retained items are no base for new statistics. `unlearn(loss=…)` is not used but by guards.

    Source: Huang, Foo & Liu, "Learning to Unlearn for Robust Machine Unlearning", arXiv 2407.10494. The three phases,
    both kinds of feedback and the harmonization are the paper's, in the one-sided form as others describe it. The
    number of attacks, what they see, the strangers, the split, the learning rates and the displaced-gradient rules are
    reconstructed: the paper's were not at hand.

    Args:
        forget_weight: λ ≥ 0. The feedback of the attacks ends once they are content, so λ may be large; the learning
            rate must be small instead (0.003 with SGD where none is given): on digits, λ = 1 at 0.03 ruined the model.
        inner_lr: the inner step α ≥ 0. None: a relative step of 0.1; a number is an absolute step (parameters per
            gradient) unless `relative_inner_lr` is set.
        relative_inner_lr: the inner step has length `inner_lr` whatever the gradient's norm.
        gradient: "first_order" (four passes a step) or "secant" (six, all of the meta-gradient); see `fastlur.meta`.
        harmonize: "one_sided", "symmetric" or "none".
        attacks: how many, ≥ 2; half of them tune, half test.
        retain_fraction: share of the retain batches in (0, 1] that is used at all; below 1 that many, at least one, are
            drawn once and held on the model's device. To hold nothing, pass fewer retain data.
        nonmembers: labelled data like the retain data that the model has not seen, in any form `unlearn` takes.

    Raises:
        ArgumentError: a value out of range, or an unknown rule.
    """

    forget_weight: float = 3.0
    inner_lr: float | None = None
    relative_inner_lr: bool = False
    gradient: Rule = "first_order"
    harmonize: Harmonization = "one_sided"
    attacks: int = 4
    retain_fraction: float = 1.0
    nonmembers: Any = field(default=None, compare=False, repr=False)

    name: ClassVar[str] = "ltu"
    training: ClassVar[bool] = False
    own_objective: ClassVar[bool] = True
    rates: ClassVar[dict[str, float]] = {"sgd": 3e-3, "adamw": 3e-4}

    def __post_init__(self) -> None:
        check_range("forget_weight", self.forget_weight, example=3)
        if self.inner_lr is not None:
            meta.check_inner_lr(self.inner_lr)
        check_range("retain_fraction", self.retain_fraction, 0, 1, example=0.05)
        if self.retain_fraction == 0:
            raise ArgumentError("retain_fraction=0 would leave nothing to remember; give a number > 0, such as 0.05")
        for name, known in (("gradient", get_args(Rule)), ("harmonize", get_args(Harmonization))):
            if unknown(getattr(self, name), known):
                raise ArgumentError(f"{name}={getattr(self, name)!r} is unknown; {nearest(getattr(self, name), known)}")
        if self.nonmembers is not None:
            source(self.nonmembers, "nonmembers", BATCH)
        if not isinstance(self.attacks, int) or isinstance(self.attacks, bool) or self.attacks < 2:
            raise ArgumentError(f"attacks={self.attacks!r} must be a whole number ≥ 2: some tune, others test")

    @property
    def cost(self) -> Cost:
        """Two or three passes of each side; both gradients and the displaced point."""
        looks = f"{1 + len(NOISE)} forwards over up to {AUDITED} retain batches"
        if self.nonmembers is not None:
            looks = f"1 forward over up to {AUDITED} retain batches and as many others"
        note = f"beforehand {looks}, to fit the attacks"
        return Cost(passes=6 if self.gradient == "secant" else 4, buffers=3, note=note, adds=True)

    def settings(self) -> dict[str, Any]:
        """The arguments; data as a digest."""
        data = None
        if self.nonmembers is not None:
            with borrowed_random(torch.device("cpu")):
                data = content.read(source(self.nonmembers, "nonmembers", BATCH), "nonmembers", 0).digest
        return super().settings() | {"nonmembers": data}

    def prepare(self, passes: Passes) -> LTUState:
        """Draw the part of the retain data that is used, and fit the attacks.

        Raises:
            ArgumentError: outside of `unlearn`, or a fraction of data that do not tell their length.
        """
        feed, count = passes.feed, passes.feed.per_epoch("retain")
        some = self.retain_fraction < 1
        if some and count is None:
            raise ArgumentError(
                f"retain_fraction={self.retain_fraction!r}: the retain data do not tell their length; pass fewer data"
            )
        # the fraction as people write it: 0.07 of 100 batches are 7, where floating point has a little more
        limit = math.ceil(Fraction(str(self.retain_fraction)) * (count or 1)) if some else AUDITED
        batches = list(feed.batches("retain", limit, DRAW))
        state = LTUState(passes, batches if some else [], self.inner_lr)
        members, strangers = self._outputs(passes, batches[:AUDITED], state.point)
        state.attackers = Attackers(members, strangers, self.attacks, derive(passes.seed, "attacks"))
        return state

    def direction(self, passes: Passes, state: LTUState) -> Direction:
        """Both meta-gradients, harmonized."""
        if state.held:
            number = (passes.step - 1) % len(state.held)
            passes.replace("retain", state.held[number], DRAW, number)
        self._meta(passes, state, "retain", state.retain, remembering)
        self._meta(passes, state, "forget", state.forget, lambda tunes: forgetting(tunes, state.attackers))
        if self.harmonize != "none":
            dots = ops.grad_dot(state.retain.flats, state.forget.flats)[0]
            ops.project(state.retain.flats, state.forget.flats, dots, self.harmonize)
        return Direction(state.retain, state.forget)

    def _meta(self, passes: Passes, state: LTUState, side: Which, out: Vector, part: Any) -> None:
        """out ← the gradient of ½ A(θ) + ½ B(θ − α∇A(θ)) by the rule chosen, A = part(True), B = part(False)."""
        theta, point, tune, test = passes.space.theta.flats, state.point, part(True), part(False)
        relative = self.relative_inner_lr or self.inner_lr is None
        weight = passes.weights[side] / 2
        passes.gradient(side, out, loss=tune, weight=weight)
        norm2 = ops.grad_dot(out.flats, out.flats)[0][0] if relative else None
        ops.displace(point.flats, theta, out.flats, state.inner_lr, norm2)
        if self.gradient == "first_order":
            passes.gradient(side, out, point, loss=test, weight=weight, add=True)
            return
        passes.gradient(side, out, point, loss=test, weight=weight)
        ops.displace(point.flats, theta, out.flats, state.inner_lr, norm2)
        passes.gradient(side, out, point, loss=tune, weight=weight, add=True)

    def _outputs(self, passes: Passes, batches: list[Any], point: Vector) -> tuple[Tensor, Tensor]:
        """Features of members and of strangers; `point` is overwritten."""
        space = passes.space

        def seen(data: Iterable[Any]) -> Tensor:
            found = []
            for batch in data:
                here = to_device(batch, space.device)
                found.append(passes.spare.run(lambda: _features(passes.spare.plain, here), here))  # noqa: B023
            return torch.cat(found)

        with passes.aside(), torch.no_grad(), passes.statistics.frozen():
            members = seen(batches)
            if self.nonmembers is not None:
                held_out = source(self.nonmembers, "nonmembers", BATCH).once(derive(passes.seed, "nonmembers"))
                return members, _strangers(seen, islice(held_out, AUDITED))
            generator, strangers = torch.Generator(space.device), []
            for noise in NOISE:
                generator.manual_seed(derive(passes.seed, "noise", noise))
                for flat, theta in zip(point.flats, space.theta.flats, strict=True):
                    flat.normal_(generator=generator).mul_(noise).add_(1).mul_(theta)
                with space.at(point):
                    strangers.append(seen(batches))
        return members, torch.cat(strangers)


def _strangers(seen: Callable[[Iterable[Any]], Tensor], held_out: Iterable[Any]) -> Tensor:
    """Features of the data that the user gave as not seen by the model.

    Raises:
        DataError: the model cannot take them, or none of them counts.
    """
    remedy = "; pass labelled data like those to retain"
    with told(DataError, "nonmembers: the model cannot take them", remedy):
        found = seen(held_out)
    if not len(found):
        raise DataError(f"nonmembers: not one has a label that counts{remedy}")
    return found


class LTUState(State):
    """Both meta-gradients, the displaced point, the attacks, and the retain batches held where only some are used.

    Vectors are overwritten in each step, and the batches drawn again by `prepare`; the attacks are what is saved.
    """

    attackers: Attackers

    def __init__(self, passes: Passes, held: list[Any], inner_lr: float | None) -> None:
        self.held = held
        self.retain, self.forget = passes.space.vector(), passes.space.vector()
        self.point = passes.space.vector()
        alpha = RELATIVE_DEFAULT if inner_lr is None else inner_lr
        self.inner_lr = torch.tensor(alpha, dtype=torch.float64, device=passes.space.device)

    def tensors(self) -> dict[str, Tensor]:
        """The fitted attacks."""
        return self.attackers.tensors()


def remembering(tunes: bool) -> Loss:
    """Mean cross-entropy over the items whose class is in one (or the other) half of the classes.

    The half is drawn from torch's generator, which stands at the same place in both passes of a side.

    Args:
        tunes: the first half, else the second.
    """

    def loss(model: Any, batch: Any) -> Tensor:
        logits, targets = logits_and_targets(model, batch)
        classes = logits.shape[-1]
        first = torch.rand(classes, device=logits.device).argsort() < (classes + 1) // 2
        mine = (first[targets.clamp(min=0)] == tunes) & (targets != IGNORED)
        each = functional.cross_entropy(wide(logits), targets, reduction="none")
        return torch.where(mine, each, 0.0).sum() / mine.sum().clamp(min=1)

    return loss


def forgetting(tunes: bool, attackers: Attackers) -> Loss:
    """Mean log(1 + odds) of "member" in one (or the other) half of the attacks, drawn likewise."""

    def loss(model: Any, batch: Any) -> Tensor:
        logits, targets = logits_and_targets(model, batch)
        odds = attackers(features(logits, targets.clamp(min=0)))
        count = len(odds)
        first = torch.rand(count, device=logits.device).argsort() < (count + 1) // 2
        mine = (first == tunes)[:, None] & (targets != IGNORED)
        return torch.where(mine, functional.softplus(odds), 0.0).sum() / mine.sum().clamp(min=1)

    return loss


def _features(model: Any, batch: Any) -> Tensor:
    logits, targets = logits_and_targets(model, batch)
    counted = targets != IGNORED
    if bool(((targets >= logits.shape[-1]) | (targets < 0))[counted].any()):
        raise IndexError(f"a label is outside the model's {logits.shape[-1]} logits")
    return features(logits[counted], targets[counted])
