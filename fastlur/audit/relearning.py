"""Relearning: a few steps on a little of the forget set, and how much of the rest is back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from fastlur.audit.items import count, device_of, gather, joined, own_copy, rows, whole
from fastlur.errors import ArgumentError, DataError, finite
from fastlur.losses import cross_entropy
from fastlur.result import Result
from fastlur.scores import scores
from fastlur.world import borrowed_random, derive, passing, seed_torch

STEPS = (1, 2, 3, 5, 7, 10, 14, 20)
CLEAR = 0.975  # of Student's distribution: a model that never knew is called faster once in forty times


@dataclass(frozen=True)
class Relearning:
    """What came back.

    Attributes:
        steps: after how many steps was looked, from 0.
        accuracy: by model ("unlearned", and "original" and "retrained" where given), percent of the forget items that
            were not shown again, in the order of `steps`, mean over the draws.
        loss: their mean loss in nats, likewise.
        shown: forget items that were trained on.
        rest: those that were not.
        advantage: accuracy of the unlearned less that of the retrained model, in percentage points, mean over the
            steps from 1 on, over the draws and over the retrained models; None without one. 0: it comes back as what
            was never known is learned.
        error: standard error of that: over the draws of the items shown and, with several retrained models, how far
            one of these would be from the others. With a single one that part is missing, and it can be the larger.
        freedom: degrees of freedom of that error; few retrained models leave few, and the verdict is the more careful.
    """

    steps: tuple[int, ...]
    accuracy: dict[str, tuple[float, ...]]
    loss: dict[str, tuple[float, ...]]
    shown: int
    rest: int
    advantage: float | None
    error: float | None
    freedom: int

    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    @property
    def comes_back(self) -> bool | None:
        """Whether it comes back faster than what was never known is learned; None where nothing tells the error."""
        if self.advantage is None or self.error is None or not self.freedom:
            return None
        from scipy.stats import t as student  # here: training needs none of it

        return bool(self.advantage > max(float(student.ppf(CLEAR, self.freedom)) * self.error, 100 / self.rest))

    @property
    def reading(self) -> str:
        """One line."""
        last, figures = self.steps[-1], self.accuracy["unlearned"]
        others = ", ".join(f"{name} {of[-1]:.0f} %" for name, of in self.accuracy.items() if name != "unlearned")
        line = f"after {last} steps on {self.shown} of {self.shown + self.rest} forget items the rest is right at "
        line += f"{figures[-1]:.0f} % (before them {figures[0]:.0f} %" + (f"; {others})" if others else ")")
        if self.advantage is None:
            return line + "; without a retrained model that says little"
        ahead = f"{self.advantage:+.1f} points on the way, standard error {self.error:.1f}"
        if self.comes_back is None:
            return f"{line}; one draw and one retrained model do not tell how much of that is chance ({ahead})"
        verdict = "comes back faster than" if self.comes_back else "comes back no faster than"
        return f"{line}: it {verdict} in a model that never knew it ({ahead})"


def relearning(
    model: nn.Module | Result,
    forget: Any,
    *,
    retrained: nn.Module | Result | Sequence[nn.Module | Result] | None = None,
    original: nn.Module | Result | None = None,
    retain: Any = None,
    share: float = 0.1,
    steps: Sequence[int] = STEPS,
    lr: float = 0.003,
    momentum: float = 0.9,
    batch_size: int = 32,
    draws: int = 5,
    seed: int = 0,
) -> Relearning:
    """Train copies of the models on a little of the forget set and see how fast the rest of it comes back.

    Rule: SGD on the mean cross-entropy of the items shown, in eval mode (normalisation statistics as they are, no
    dropout), all parameters moving. Every model sees the same batches. A model that forgot should be no faster than one
    that never knew; that one is fast as well where the rest of the data help, or where saying one class is the answer.

    Source: in the spirit of Hu et al., "Jogging the Memory of Unlearned LLMs Through Targeted Relearning Attacks",
    arXiv 2406.13356, and, for classifiers, arXiv 2505.22310; this form is reconstructed.

    Args:
        model: the one that has forgotten, or the `Result`. None of the models is changed.
        forget: what it forgot, labelled data as `unlearn` takes them.
        retrained: a model trained without the forget set, or several that differ in their seed: the truth to compare
            with. Several are better: how fast a model learns depends on its training.
        original: the model before, for what is there to come back.
        retain: other data that the attacker has; as many of them are mixed into every batch. None: none.
        share: of the forget items shown, in (0, 1); at least one is, and one is not.
        steps: when to look; ascending, ≥ 1.
        lr: learning rate > 0.
        momentum: in [0, 1).
        batch_size: forget items a step.
        draws: how many times the items shown are drawn anew.
        seed: fixes them.

    Raises:
        ArgumentError: a value out of range, or a learning rate so large that the loss is not finite.
        ModelError: no module, or one that cannot be copied.
        DataError: data that are not labelled, of fewer than two items, or do not fit.
    """
    if not (finite(share) and 0 < share < 1):
        raise ArgumentError(f"share={share!r} must be a number between 0 and 1, such as 0.1")
    if not (finite(lr) and lr > 0) or not (finite(momentum) and 0 <= momentum < 1):
        raise ArgumentError(f"lr={lr!r}, momentum={momentum!r}: lr must be positive and momentum in [0, 1)")
    marks = [0, *(whole("steps", each) for each in (steps if isinstance(steps, Sequence) else (steps,)))]
    if len(marks) < 2 or any(a >= b for a, b in pairwise(marks)):
        raise ArgumentError(f"steps={steps!r} must be ascending whole numbers, such as {STEPS}")
    whole("batch_size", batch_size)
    whole("draws", draws)
    truths = retrained if isinstance(retrained, Sequence) else () if retrained is None else (retrained,)
    named: list[tuple[str, Any]] = [("unlearned", model), ("original", original), *(("retrained", t) for t in truths)]
    models = [(name, own_copy(_module(each), name)) for name, each in named if each is not None]
    device = device_of(models[0][1])
    gone = gather(forget, "forget", device, derive(seed, "forget"))
    kept = None if retain is None else gather(retain, "retain", device, derive(seed, "retain"))
    items = count(gone)
    if items < 2:
        raise DataError("forget: holds one item; relearning shows some of them and asks about the others")
    shown = min(items - 1, max(1, round(share * items)))
    figures: dict[int, list[list[tuple[float, float]]]] = {number: [] for number in range(len(models))}
    with borrowed_random(device):
        for draw in range(draws):
            generator = torch.Generator().manual_seed(derive(seed, "shown", draw))
            order = torch.randperm(items, generator=generator)
            again, rest = rows(gone, order[:shown]), rows(gone, order[shown:])
            batches = [_batch(again, kept, batch_size, generator) for _ in range(marks[-1])]
            for number, (name, each) in enumerate(models):
                seed_torch(derive(seed, "pass", draw), device)
                figures[number].append(_relearn(own_copy(each, name), batches, rest, marks, lr, momentum))
    table: dict[str, np.ndarray] = {}  # model: (of that kind, draws, marks, 2)
    for number, (name, _) in enumerate(models):
        mine = np.array(figures[number])[None]
        table[name] = np.concatenate([table[name], mine]) if name in table else mine
    advantage, error = _advantage(table["unlearned"], table.get("retrained"))
    freedom = 0 if not truths else (len(truths) if len(truths) > 1 else draws) - 1
    return Relearning(
        steps=tuple(marks),
        accuracy={name: tuple(every[..., 0].mean((0, 1)).tolist()) for name, every in table.items()},
        loss={name: tuple(every[..., 1].mean((0, 1)).tolist()) for name, every in table.items()},
        shown=shown,
        rest=items - shown,
        advantage=advantage,
        error=error,
        freedom=freedom,
    )


def _advantage(unlearned: np.ndarray, retrained: np.ndarray | None) -> tuple[float | None, float | None]:
    """How far ahead in accuracy, and the standard error of that; shapes (models, draws, marks, 2)."""
    if retrained is None:
        return None, None
    ahead = (unlearned - retrained)[:, :, 1:, 0].mean(2)
    models, draws = ahead.shape
    of_draws = ahead.mean(0).var(ddof=1) / draws if draws > 1 else 0.0
    of_models = ahead.mean(1).var(ddof=1) * (1 + 1 / models) if models > 1 else 0.0
    return float(ahead.mean()), float((of_draws + of_models) ** 0.5)


def _batch(again: Any, kept: Any, size: int, generator: torch.Generator) -> Any:
    """Items of those shown, without repetition where there are enough, and as many of the others."""
    drawn = rows(again, torch.randperm(count(again), generator=generator)[:size])
    if kept is None:
        return drawn
    return joined(drawn, rows(kept, torch.randperm(count(kept), generator=generator)[: count(drawn)]))


def _relearn(
    model: nn.Module, batches: list[Any], rest: Any, marks: list[int], lr: float, momentum: float
) -> list[tuple[float, float]]:
    """Accuracy in percent and mean loss on the rest, at every mark."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=momentum)
    found = []
    for step in range(marks[-1] + 1):
        if step in marks:
            said = scores(model, rest, "forget", 1024)
            found.append((100 * float(said.hit.mean()), float(said.loss.mean())))
        if step < marks[-1]:
            optimizer.zero_grad()
            with passing(model, device_of(model), "fp32", training=False):
                loss = cross_entropy(model, batches[step])
                torch.autograd.backward(loss)
            try:
                optimizer.step()
            except RuntimeError:  # a rate that float32 does not hold
                loss.detach().fill_(torch.nan)
            if not bool(torch.isfinite(loss)) or not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                raise ArgumentError(f"lr={lr!r}: relearning diverged in step {step + 1}; choose a smaller one")
    return found


def _module(model: Any) -> Any:
    return model.model if isinstance(model, Result) else model
