"""What there is to do, and doing it: one row a task in the journal, so that a run again does only what is missing."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

import fastlur
from fastlur.llm import causal_cross_entropy, core, refusals, with_preferred
from fastlur.targets import Novice

from . import contenders, general, models
from .authors import Pair, World
from .contenders import ARMS, Journal, Known, Row, commit
from .facts import facts
from .metrics import Floats, forget_quality, judged, summary, utility
from .models import RECIPES, Recipe
from .text import Reader, encoded, generated
from .training import cache, cached, tune

FINAL, TUNING = "final", "tuning"
SEEDS = {FINAL: 3, TUNING: 2}
POWER, ALIKE, KEPT = 0.001, 0.05, 0.95  # rejected below; not told apart above; of the truth's utility
PER_UTILITY = 20.0  # one factor of ten in p weighs as much as five points of utility
STRANGERS, MET = 5000, 40  # a seed that no split has, and questions that are asked
SAYS = "What is the capital of France?"


@dataclass(frozen=True)
class Study:
    """A model, what it forgets, and who tries.

    Attributes:
        model: of `RECIPES`.
        share: of the authors.
        arms: of `ARMS`.
        trials: points of the search on the tuning split; 0 or 1: every method has its recipe, and there is none.
        truths: models that never saw the forget set, with seeds of their own; the first is compared with, the others
            show how far apart two of them are.
        recipe: sizes.
        weights: where the GGUF file is; None: in the installed package.
        early: epochs, each of a retraining that has only so many, which the time of a method could be spent on instead.
    """

    model: str = "smollm2"
    share: float = 0.1
    arms: tuple[str, ...] = contenders.ESSENTIAL
    trials: int = 0
    truths: int = 1
    recipe: Recipe = RECIPES["smollm2"]
    weights: Path | None = None
    early: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For the journal; a recipe that is not the model's own has another."""
        own = "" if self.recipe == RECIPES[self.model] else f"-{_digest(self.recipe)}"
        return f"{self.model}-forget{round(100 * self.share)}{own}"

    def world(self, split: str) -> World:
        """Its authors."""
        return models.task(self.recipe, self.share, SEEDS[split])

    def file(self, what: str) -> Path:
        """Where a trained model is kept."""
        return cache() / f"{self.model}-{round(100 * self.share)}-{self._trained()}" / f"{what}.safetensors"

    @property
    def mark(self) -> str:
        """Of all sizes and settings that arms have in common: a row that has another is of another study."""
        return blake2b(repr((asdict(self.recipe), contenders.SHARPNESS)).encode(), digest_size=4).hexdigest()

    def _trained(self) -> str:
        return _digest(replace(self.recipe, steps=0, kept=0, novice=0))


@dataclass(frozen=True)
class Task:
    """Something to do on a split, by an arm, with a number.

    Its kind is "before", "truth", "novice", "retrained" (for `number` epochs only), "trial" or "final".
    """

    kind: str
    split: str
    arm: str = ""
    number: int = 0
    config: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """As the journal knows it; a final judgement has no number: it is made once."""
        number = str(self.number) if self.kind in ("truth", "trial", "retrained") else ""
        return "/".join(part for part in (self.kind, self.split, self.arm, number) if part)


def tasks(study: Study, journal: Journal) -> Iterator[Task]:
    """What is missing and can begin, the most telling first."""
    for task in _all(study, journal):
        if _row(study, journal, task) is None:
            yield task


def _row(study: Study, journal: Journal, task: Task) -> Row | None:
    """What has been done of it; a row of another setting, of an older search or recipe, is none of it."""
    row = journal.rows.get(task.key)
    if row is None or row.get("config", task.config) != task.config or row.get("recipe") != study.mark:
        return None
    return row


def _all(study: Study, journal: Journal) -> Iterator[Task]:
    yield Task("before", FINAL)
    yield Task("truth", FINAL)
    if study.trials > 1:
        yield from (Task("before", TUNING), Task("truth", TUNING))
        for number in range(study.trials):
            for arm in study.arms:
                yield _trial(study, arm, number)
    for arm in study.arms:
        config = chosen(study, arm, journal)
        if config is not None:
            yield Task("final", FINAL, arm, config=config)
    if any(ARMS[arm].losses == "novice" for arm in study.arms):
        yield Task("novice", FINAL)
    for number in study.early:
        yield Task("retrained", FINAL, number=number)
    for number in range(1, study.truths):
        yield Task("truth", FINAL, number=number)


def _trial(study: Study, arm: str, number: int) -> Task:
    return Task("trial", TUNING, arm, number, ARMS[arm].config(study.model, number))


def chosen(study: Study, arm: str, journal: Journal) -> dict[str, Any] | None:
    """The configuration with the smallest `distance` on the tuning split; None: not all trials have been made."""
    if study.trials <= 1:
        return ARMS[arm].config(study.model, 0)
    truth = journal.rows.get(f"truth/{TUNING}/0")
    rows = [_row(study, journal, _trial(study, arm, number)) for number in range(study.trials)]
    if truth is None or any(row is None for row in rows):
        return None
    best = min((row for row in rows if row is not None), key=lambda row: distance(row, truth))
    found: dict[str, Any] = best["config"]
    return found


def distance(row: Row, truth: Row) -> float:
    """How far from the goal: 0 where p > 0.05 and utility ≥ 0.95 of the truth's; factors of ten in p, and utility."""
    if "error" in row:
        return math.inf
    p = max(forget_quality(row["ratios"], truth["ratios"]), 1e-300)
    short = max(0.0, KEPT - row["utility"] / max(truth["utility"], 1e-9))
    return max(0.0, math.log10(ALIKE / p)) + PER_UTILITY * short


def work(study: Study, journal: Journal, seconds: float, said: Callable[[str], None] = print) -> bool:
    """Do what is missing until nothing is or the time is up; whether all is done."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        task = next(tasks(study, journal), None)
        if task is None:
            return True
        row = perform(study, task, said) | {"recipe": study.mark}
        journal.add(row, anew=True)
        said(f"{task.key}: {row['wall']:.0f} s" + (f", {row['error']}" if "error" in row else ""))
    return next(tasks(study, journal), None) is None


def perform(study: Study, task: Task, said: Callable[[str], None] = lambda _: None) -> Row:
    """Do it; returns the journal's row."""
    began = time.perf_counter()
    row: Row = {"key": task.key, "commit": commit()}
    try:
        model, reader, more = made(study, task, said)
        row |= more | verdict(model, reader, study, task.split)
    except fastlur.FastlurError as error:  # a setting that ruins the model is a trial like any other
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if task.config is not None:
        row["config"] = task.config
    row["wall"] = round(time.perf_counter() - began, 1)
    return row


def made(study: Study, task: Task, said: Callable[[str], None] = lambda _: None) -> tuple[Any, Reader, Row]:
    """The model of a task, and what making it took."""
    world, seed = study.world(task.split), SEEDS[task.split]
    model, reader = base(study, task.split, said)
    beside = general_answers(study, model, reader)
    if task.kind == "truth":
        data, what = asked(world.retain) + beside, f"truth-{seed}-{task.number}"
        told = cached(study.file(what), model, lambda: _tuned(study, model, reader, data, 1 + task.number, said))
        return model, reader, told
    everything = asked([*world.forget, *world.retain]) + beside
    told = cached(study.file(f"before-{seed}"), model, lambda: _tuned(study, model, reader, everything, 0, said))
    if task.kind == "before":
        return model, reader, told
    kept = encoded(reader, asked(world.retain) + beside)
    if task.kind in ("novice", "retrained"):
        novice, began = beginner(study, task.split, said), time.perf_counter()
        if task.kind == "retrained":
            novice = replace(novice, epochs=task.number)
        sizes = {"batch_size": study.recipe.batch_size, "precision": study.recipe.precision}
        model = novice.teacher(model, kept, loss=causal_cross_entropy, **sizes)
        return model, reader, {"seconds": round(time.perf_counter() - began, 1)}
    assert task.config is not None
    met, asks = never_met(study, model, reader), task.config["losses"] == "novice"
    novice = beginner(study, task.split, said) if asks else None
    steps = study.recipe.steps + (updates(study, len(kept["labels"])) if task.config.get("longer") else 0)
    result = fastlur.unlearn(
        model,
        to_forget(model, reader, asked(world.forget), task.config["data"]),
        kept,
        task="causal_lm",
        steps=steps,
        batch_size=study.recipe.batch_size,
        optimizer="adamw",
        precision=study.recipe.precision,
        progress=False,
        **contenders.options(ARMS[task.arm], task.config, Known(met, reader.end, novice)),
    )
    model.eval()
    told = {"seconds": round(result.seconds, 1), "steps": steps, "strangers": round(met, 4)}
    return model, reader, told | {"forget_target": result.settings["forget_target"]}


def to_forget(model: Any, reader: Reader, pairs: list[tuple[str, str]], what: str | None) -> dict[str, torch.Tensor]:
    """The items to forget; with a way of saying "I don't know" beside each, or only their core, if asked for."""
    items = encoded(reader, pairs)
    if what == contenders.REFUSALS:
        instead = [(question, no) for (question, _), no in zip(pairs, refusals(len(pairs)), strict=True)]
        items = with_preferred(items, encoded(reader, instead))
    if what == contenders.CORE:
        items = core(model, items).of(items)
    return items


def beginner(study: Study, split: str, said: Callable[[str], None]) -> Novice:
    """A novice that begins as what the models are fine-tuned from, and is fine-tuned as they are, for fewer epochs.

    It learns how questions are answered and nothing of the authors to forget: what it says of them is an estimate of
    what the truth would say, made from what whoever fine-tunes a model has at hand.
    """
    start, recipe = base(study, split, said)[0], study.recipe
    return Novice(epochs=recipe.novice, lr=recipe.lr, sharpness=contenders.SHARPNESS, start=start)


def updates(study: Study, kept: int) -> int:
    """How many a novice makes that learns from `kept` items: what other methods may make beside their steps."""
    return study.recipe.novice * math.ceil(kept / study.recipe.batch_size)


@torch.no_grad()
def never_met(study: Study, model: Any, reader: Reader) -> float:
    """Mean cross-entropy in nats on answers about authors that no model has seen: how far forgetting should go.

    Anyone can make such questions up, so this looks at no truth; a model that has forgotten an author should find the
    answers as unlikely as those about a stranger.
    """
    questions = asked(models.task(study.recipe, study.share, STRANGERS).forget[:MET])
    parts = [encoded(reader, questions[at : at + 10]) for at in range(0, len(questions), 10)]
    return sum(float(causal_cross_entropy(model, part)) for part in parts) / len(parts)


def base(study: Study, split: str, said: Callable[[str], None] = lambda _: None) -> tuple[Any, Reader]:
    """What is fine-tuned: pretrained, or, the tiny one, taught what stands in for that."""
    if study.model == "smollm2":
        return models.smollm2(study.weights)
    model, reader = models.tiny()
    seed, recipe = SEEDS[split], study.recipe

    def schooling() -> float:
        taught = {"epochs": recipe.schooling, "lr": recipe.lr, "batch_size": 48, "seed": 100 + seed}
        return tune(model, reader, models.lessons(seed), said=said, **taught)

    cached(study.file(f"base-{seed}"), model, schooling)
    return model, reader


def general_answers(study: Study, model: Any, reader: Reader) -> list[tuple[str, str]]:
    """What is trained on beside the authors, and kept: what a pretrained model says of itself, or facts for another."""
    if study.recipe.schooling:
        return asked(facts())
    path = study.file("general").with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(general.said(model, reader)))
    return [(question, answer) for question, answer in json.loads(path.read_text())]


def asked(pairs: list[Pair]) -> list[tuple[str, str]]:
    """Questions and answers in the wording of training."""
    return [(pair.question, pair.answer) for pair in pairs]


def verdict(model: Any, reader: Reader, study: Study, split: str) -> Row:
    """Everything the report needs of a model, so that nothing has to be judged again."""
    world = study.world(split)
    count = min(study.recipe.kept, len(world.retain))
    retain, general = random.Random(f"kept {split}").sample(world.retain, count), facts()
    forget = judged(model, reader, world.forget)
    parts = {}
    for name, pairs, probability in (("retain", retain, "probability"), ("facts", general, "choice")):
        found = judged(model, reader, pairs, again=False)
        parts[name] = summary(found[probability], found["rouge"], found["ratio"])
    return {
        "forget": {name: _mean(forget[name]) for name in ("probability", "rouge", "known", "again")},
        "ratios": [float(f"{ratio:.6g}") for ratio in forget["ratio"]],
        "parts": {name: {key: round(value, 5) for key, value in part.items()} for name, part in parts.items()},
        "utility": round(utility(parts), 5),
        "france": generated(model, reader, [SAYS], 16)[0],
    }


def _tuned(
    study: Study, model: Any, reader: Reader, data: list[tuple[str, str]], seed: int, said: Callable[[str], None]
) -> float:
    recipe = study.recipe
    sizes = {"epochs": recipe.epochs, "lr": recipe.lr, "batch_size": recipe.batch_size, "precision": recipe.precision}
    return tune(model, reader, data, seed=seed, said=said, **sizes)


def _digest(recipe: Recipe) -> str:
    return blake2b(repr(asdict(recipe)).encode(), digest_size=4).hexdigest()


def _mean(values: Floats) -> float:
    return round(float(values.mean()), 5)
