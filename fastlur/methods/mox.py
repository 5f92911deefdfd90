"""MOX: memorise, then step the other way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from fastlur import ops
from fastlur.errors import ArgumentError, DataError, nearest, unknown
from fastlur.frozen import Frozen
from fastlur.losses import IGNORED, PREFERRED, logits_and_targets, reads_ahead, relative_entropy, split, wide
from fastlur.methods.base import Cost, Direction, Recipe, State, check_range
from fastlur.passes import Loss, Passes
from fastlur.space import Vector

Form = Literal["plain", "npo"]
ALPHAS = [0.5 * 2 ** (k / 2) for k in range(13)]  # 0.5, 0.71, 1, … 32: what a search tries, in this order
SMALLER = [0.5 * 2 ** (-k / 2) for k in range(1, 9)]  # 0.35, 0.25, … 0.03: where 0.5 is too far already
PROBES = 8  # retain batches that a search is judged on
FURTHEST = 1000.0


@dataclass(frozen=True)
class MOX(Recipe):
    """Memorise the forget data by descent, then extrapolate the weights to the other side of the model as given.

    Steps minimise mean CE(θ; forget) + mean KL(p_θ₀ ‖ p_θ; retain), which leads from θ₀ to θ_mem; at the end

        θ ← (1 + α) θ₀ − α θ_mem

    Passes run in eval mode and the normalisation statistics stay as given: those of θ_mem would belong to neither end.
    The losses of both sides are the method's own; `unlearn(loss=…)` serves only to judge retaining.

    While steps run, the model is the *memorising* one: callbacks, stopping rules and `max_retain_loss_increase` see it
    and not what becomes of it, and a run that any of them ends is extrapolated from where it ended. A budget on the
    retain loss looks at the extrapolated model as well and gives the one as given back where that is outside it;
    `retain_limit` does not let it come to that.

    How far α may go depends on how far memorising went, that is on data, optimizer and length, and too far ruins the
    model at once: on digits with SGD, α = 8 forgets a class and loses nothing while α = 32 is at half the accuracy;
    with AdamW at a rate of 1e-3, α = 2 is that far already. So α is searched for by default.

    Several forget sets one after the other need no state: call `unlearn` once for each. Each call starts from what the
    last one left, keeps to that, and must not find an earlier forget set among its retain data. Each takes some of what
    the weights can bear: on digits a second class went wholly or by half within the same limit or, as a warning then
    says, not at all.

    Source: "Memorize to Forget", arXiv 2602.06441; objective, extrapolation, α, momentum and settings are reconstructed
    from accounts of it. The search for α, the cap on `target` and what a round is are this package's. The presets lack
    the epoch of warm-up, which is no schedule of `unlearn`.

    Args:
        alpha: α in [0, 1000], 4 in the publication. None: the largest of 0.5, 0.71, 1, … 32 up to which the retain loss
            in eval mode, on 8 retain batches, has risen by at most `retain_limit`. Where 0.5 is too far already, since
            memorising went far, the largest of 0.35, 0.25, … 0.03 that is not; 0 (the model as given) if none is.
        retain_limit: in the units of the retain loss, ≥ 0; used where `alpha` is None.
        momentum: η in (0, 1]: θ_for ← η θ_for^t + (1 − η) θ_for^(t−1) over rounds t, each extrapolated from where
            memorising stood after it; the first is taken whole. 1: the last alone. 0.675 in the publication.
        rounds: equal parts of the planned steps, ≥ 1; a part that was broken off counts as one.
        memorise: "plain", or "npo": (2/β) log σ(−β log(p_θ/p_θ₀)) of the true class in place of the cross-entropy; of
            text, of the whole answer.
        beta: β > 0 of "npo".
        target: the class to be answered instead, or for each class the one to be answered instead of it: the mean CE
            towards it is subtracted while memorising. This begins with steep gradients where the model is sure of
            itself; bound them (on digits, SGD diverged without `max_grad_norm=0.1`). In text "preferred": the other
            answers that come in the batch (see `fastlur.llm.with_preferred`), token by token. None: whatever comes.
        target_cap: nats ≥ 0 by which that CE may rise over what it is at θ₀; beyond, an item is left alone, since the
            term is unbounded below.

    Raises:
        ArgumentError: a value out of range.
    """

    alpha: float | None = None
    retain_limit: float = 0.05
    momentum: float = 1.0
    rounds: int = 10
    memorise: Form = "plain"
    beta: float = 0.1
    target: int | tuple[int, ...] | Literal["preferred"] | None = None
    target_cap: float = 4.0

    name: ClassVar[str] = "mox"
    caveat: ClassVar[str] = (
        "The weights were extrapolated along a straight line on which the forget items had been memorised once more: "
        "whoever has the weights from before knows that line. Approximate, without a certificate of deletion."
    )
    training: ClassVar[bool] = False
    own_objective: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "llm": {
            "method": {"alpha": 4.0},
            "optimizer": "adamw",
            "lr": 1e-5,
            "weight_decay": 0.01,
            "batch_size": 32,
            "epochs": 10,
        },
        "llm_momentum": {
            "method": {"alpha": 4.0, "momentum": 0.675},
            "optimizer": "adamw",
            "lr": 1e-5,
            "weight_decay": 0.01,
            "batch_size": 32,
            "epochs": 10,
        },
    }

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0, FURTHEST, example=4)
        check_range("retain_limit", self.retain_limit, example=0.05)
        check_range("momentum", self.momentum, 0, 1, example=0.675)
        check_range("beta", self.beta, example=0.1)
        check_range("target_cap", self.target_cap, example=4)
        for name in ("momentum", "beta"):
            if getattr(self, name) == 0:
                raise ArgumentError(f"{name}=0 would leave nothing; give a number > 0")
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 1:
            raise ArgumentError(f"rounds={self.rounds!r} must be a positive whole number, such as 10")
        if unknown(self.memorise, get_args(Form)):
            raise ArgumentError(f"memorise={self.memorise!r} is no form; {nearest(self.memorise, get_args(Form))}")
        if isinstance(self.target, str) and self.target != "preferred":
            raise ArgumentError(f"target={self.target!r} must be class numbers, 'preferred', or None")
        for wanted in self._wanted():
            if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 0:
                raise ArgumentError(f"target={self.target!r} must be a class number ≥ 0, or a tuple of one for each")

    @property
    def cost(self) -> Cost:
        """A pass of each side, the model as given on the retain batch (and the forget batch), one search at the end."""
        note = "at the end up to 14 forwards over 8 retain batches, to find alpha" if self.alpha is None else ""
        other = self.target == "preferred"  # one more forward and backward within the pass
        return Cost(
            passes=2 + other,
            forwards=1 + (self.memorise == "npo" or self._classes) + other,
            buffers=3 if self.momentum == 1 else 4,
            note=note,
        )

    def prepare(self, passes: Passes) -> MOXState:
        """Keep the weights as given; refuse what could not be finished.

        Raises:
            ArgumentError: `alpha` is to be searched for, or rounds counted, outside of `unlearn`.
        """
        if self.alpha is None:
            _ = passes.feed
        if self.momentum < 1 and passes.steps is None:
            raise ArgumentError(f"momentum={self.momentum!r}: rounds are parts of a planned run; use fastlur.unlearn")
        wanted = torch.tensor(self._wanted(), device=passes.space.device) if self._classes else None
        return MOXState(passes, wanted, self.momentum)

    def direction(self, passes: Passes, state: MOXState) -> Direction:
        """The gradients of both parts of the memorising loss."""
        if self.momentum < 1 and passes.steps is not None and self._begins_a_round(passes.step, passes.steps):
            state.fold(passes.space.theta)
        kept = state.frozen.logits(passes.batch("retain"))
        batch = passes.batch("forget")
        given = state.frozen.logits(batch) if self.memorise == "npo" or self._classes else None
        other = state.frozen.logits(_preferred(batch)) if self.target == "preferred" else None
        passes.gradient("retain", state.retain, loss=lambda model, batch: divergence(kept, model, batch), weight=1.0)
        passes.gradient("forget", state.forget, loss=self._memory(given, state.wanted, other), weight=1.0)
        return Direction(state.retain, state.forget)

    def finish(self, passes: Passes, state: MOXState) -> None:
        """Extrapolate; what memorising did not move stays bit for bit."""
        theta, given, found = passes.space.theta, state.frozen.point, state.retain
        state.fold(theta)
        with torch.no_grad():
            memorised = state.forget if state.average is None else state.average
            if state.average is None:
                torch._foreach_copy_(memorised.flats, theta.flats)
            alpha = self._search(passes, state, memorised) if self.alpha is None else self.alpha
            ops.extrapolate(found.flats, given.flats, memorised.flats, alpha)
            for now, before, new in zip(theta.flats, given.flats, found.flats, strict=True):
                now.copy_(torch.where(now == before, before, new))

    def _search(self, passes: Passes, state: MOXState, memorised: Vector) -> float:
        """The largest α up to which the retain loss stays within its limit."""
        batches = list(passes.feed.batches("retain", PROBES, draw="mox"))
        found, given = state.retain, state.frozen.point

        def loss(alpha: float) -> float:
            ops.extrapolate(found.flats, given.flats, memorised.flats, alpha)
            total = 0.0
            for batch in batches:
                with passes.aside({"retain": batch}):
                    total += float(passes.value("retain", at=found))
            return total / len(batches)

        allowed, best = loss(0.0) + self.retain_limit, 0.0
        for alpha in ALPHAS:
            if not loss(alpha) <= allowed:
                break
            best = alpha
        best = best or next((alpha for alpha in SMALLER if loss(alpha) <= allowed), 0.0)
        if not best:
            warnings.warn(
                f"MOX: alpha={SMALLER[-1]:.2g} already raises the retain loss by more than retain_limit="
                f"{self.retain_limit:g}, so the model stays as given; memorise with fewer steps or a lower lr",
                stacklevel=2,
            )
        return best

    def _begins_a_round(self, step: int, steps: int) -> bool:
        return step > 1 and (step - 1) * self.rounds // steps != (step - 2) * self.rounds // steps

    def _memory(self, given: Tensor | None, wanted: Tensor | None, other: Tensor | None) -> Loss:
        def loss(model: Any, batch: Any) -> Tensor:
            logits, targets = logits_and_targets(model, batch)
            likely = _log_probabilities(logits)
            if self.memorise == "npo":
                ratio, counted = _of_answers(_rise(likely, given, targets), targets, model, batch)
                own = _mean(functional.logsigmoid(-self.beta * ratio) * (2 / self.beta), counted)
            else:
                own = functional.nll_loss(likely, targets)
            if other is not None:
                logits, instead = logits_and_targets(model, _preferred(batch))
                rise = _rise(_log_probabilities(logits), other, instead)
                return own - _mean((-rise).clamp(max=self.target_cap), instead)
            if wanted is None:
                return own
            classes = logits.shape[-1]
            if reads_ahead(model, batch):
                raise ArgumentError(f"target={self.target!r} is a class, and these are texts; use target='preferred'")
            if len(wanted) not in (1, classes) or max(self._wanted()) >= classes:
                raise ArgumentError(f"target={self.target!r} does not fit the model's {classes} classes")
            instead = wanted[targets.clamp(min=0) % len(wanted)]
            return own - _mean((-_rise(likely, given, instead)).clamp(max=self.target_cap), targets)

        return loss

    @property
    def _classes(self) -> bool:
        return self.target is not None and self.target != "preferred"

    def _wanted(self) -> tuple[int, ...]:
        if self.target is None or isinstance(self.target, str):
            return ()
        return tuple(self.target) if isinstance(self.target, tuple | list) else (self.target,)


class MOXState(State):
    """The weights as given, the two gradients, and the average of what was memorised where there is one.

    Extrapolation is linear, so averaging the extrapolated weights and extrapolating the averaged ones is the same; the
    latter leaves α open until the end.
    """

    def __init__(self, passes: Passes, wanted: Tensor | None, momentum: float) -> None:
        self.frozen = Frozen(passes)
        self.wanted, self.momentum = wanted, momentum
        self.retain, self.forget = passes.space.vector(), passes.space.vector()
        self.average = passes.space.vector() if momentum < 1 else None
        self.folded = False

    def fold(self, theta: Vector) -> None:
        """average ← η θ + (1 − η) average; the first is taken whole."""
        if self.average is not None:
            eta = self.momentum if self.folded else 1.0
            ops.extrapolate(self.average.flats, self.frozen.point.flats, theta.flats, -1.0, eta)  # α = −1: θ itself
            self.folded = True

    def vectors(self) -> dict[str, Vector]:
        """The average, once there is one."""
        return {"average": self.average} if self.folded and self.average is not None else {}

    def resume(self, names: Sequence[str]) -> dict[str, Vector]:
        """Take the average back, if there was one."""
        self.folded = "average" in names
        return self.vectors()


def divergence(reference: Tensor, model: Any, batch: Any) -> Tensor:
    """Mean KL(p_reference ‖ p_model) over the targets of a batch, in nats, shape (); `reference` are logits."""
    logits, targets = logits_and_targets(model, batch)
    before, now = _log_probabilities(reference), _log_probabilities(logits)
    return _mean(relative_entropy(before, now), targets)


def _log_probabilities(logits: Tensor) -> Tensor:
    return functional.log_softmax(wide(logits), dim=-1)


def _rise(likely: Tensor, given: Tensor | None, classes: Tensor) -> Tensor:
    """log(p_θ/p_θ₀) of one class a row, shape (n,)."""
    assert given is not None
    index = classes.clamp(min=0)[:, None]
    return (likely.gather(-1, index) - _log_probabilities(given).gather(-1, index)).squeeze(-1)


def _mean(each: Tensor, targets: Tensor) -> Tensor:
    """Over the targets that count."""
    counted = targets != IGNORED
    return torch.where(counted, each, 0.0).sum() / counted.sum().clamp(min=1)


def _of_answers(each: Tensor, targets: Tensor, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """What is known of each target, in text summed over an answer, and targets that say which of these count."""
    if not reads_ahead(model, batch):
        return each, targets
    rows = split(batch)[1].shape[0]
    counted = targets != IGNORED
    summed = torch.where(counted, each, 0.0).view(rows, -1).sum(1)
    return summed, torch.where(counted.view(rows, -1).any(1), 0, IGNORED)


def _preferred(batch: Any) -> dict[str, Any]:
    """The other answers that come in a batch, as a batch of their own."""
    names = [name for name in batch if name.startswith(PREFERRED)] if isinstance(batch, Mapping) else []
    if not names:
        raise DataError("forget: batches have no other answers; add them with fastlur.llm.with_preferred")
    return {name.removeprefix(PREFERRED): batch[name] for name in names}
