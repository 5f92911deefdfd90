"""One trial: a model as given, made to forget by a method with its settings, and what it is then."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from machine import commit
from torch import nn

import fastlur
from fastlur import targets
from fastlur.losses import BoundedForgetting
from fastlur.methods import LUR, METHODS, SaliencyMask, Trim
from fastlur.scores import scores
from fastlur.targets import Imitation, NoviceOrAscent, SecondChoice

from .contenders import DEFAULT
from .cosine import Cosines
from .scenarios import Data, Scenario
from .training import Bench, original, retrained, teacher

FIGURES = ("ua", "ra", "ta", "mia")
TAUGHT = ("novice", "blindspot", "head")
MADE = {"bounded": BoundedForgetting, "second_choice": SecondChoice, "default": NoviceOrAscent}  # without a teacher
SHARPNESS = {"novice": 2.0, "blindspot": 1.0, "head": 2.0}


@dataclass(frozen=True)
class Task:
    """Something to do, and the name it is known by in the journal.

    Attributes:
        kind: "original", "truth", "teacher", "before", "trial" or "final".
        scenario: of `SCENARIOS`.
        split: of `SPLITS`.
        arm: which contender; for "teacher" which kind.
        number: of the trial (or what it is called), of the truth's seed, or of the request a teacher is for.
        config: settings, see `points.Arm.config`.
        method: the name in `fastlur.methods`.
    """

    kind: str
    scenario: str
    split: str
    arm: str = ""
    number: int | str = 0
    config: dict[str, Any] | None = None
    method: str = ""

    @property
    def key(self) -> str:
        """A final judgement has no number: whatever was chosen, it is judged once."""
        number = "" if self.kind in ("final", "original", "before") else str(self.number)
        return "/".join(part for part in (self.kind, self.scenario, self.split, self.arm, number) if part)

    @property
    def defaults(self) -> str | None:
        """A digest of LUR's defaults where it runs with them, as LUR or lent; with others it would be another run."""
        target = self.config["target"] if self.config is not None else None
        if target == "default" or (target == "own" and self.method == "lur"):
            return defaults()
        return None

    @property
    def told(self) -> dict[str, Any]:
        """What its row says of it."""
        said = {"key": self.key, "config": self.config, "defaults": self.defaults}
        return {name: value for name, value in said.items() if value is not None}


def defaults() -> str:
    """Eight digits that are others where the package's defaults for LUR and its target are."""
    told = LUR(), LUR.rates["sgd"], LUR.max_grad_norm, NoviceOrAscent(), targets.FEWEST, targets.MOST
    return blake2b(repr(told).encode(), digest_size=4).hexdigest()


def perform(bench: Bench, task: Task) -> dict[str, Any]:
    """Do it; returns the journal's row."""
    began = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {**task.told, "commit": commit()}
    try:
        row |= _done(bench, task)
    except fastlur.FastlurError as error:  # a setting that ruins the model is a trial like any other
        row |= {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    row["wall"] = round(time.perf_counter() - began[0], 2)
    row["cpu"] = round(time.process_time() - began[1], 2)
    return row


def _done(bench: Bench, task: Task) -> dict[str, Any]:
    name, where = task.scenario, task.split
    if task.kind == "original":
        return {"seconds": original(bench, "random10" if name == "clean" else name, where)[1]}
    if task.kind == "teacher":
        return {"seconds": teacher(bench, name, where, task.number, task.arm)[1]}
    job = bench.scenario(name, where)
    if task.kind == "truth":
        model, seconds = retrained(bench, name, where, task.number)
        return judged(model, job) | {"seconds": seconds}
    model, _ = original(bench, name, where)
    if task.kind == "before":
        return judged(model, job)
    assert task.config is not None
    model, spent, more = forgotten(bench, copy.deepcopy(model), job, where, task)
    return judged(model, job) | {"rte": round(spent, 3)} | more


def forgotten(
    bench: Bench, model: nn.Module, job: Scenario, where: str, task: Task
) -> tuple[nn.Module, float, dict[str, Any]]:
    """Run every request; the seconds of the processor that it took, with those of what had to be trained for it.

    Seconds of the processor, since processes of one thread may have to wait for others.
    """
    config, spent, more = task.config or {}, 0.0, dict[str, Any]()
    # the requests share the steps, but where somebody calls with three arguments each has those that it comes with
    steps = {} if task.arm == DEFAULT else {"steps": max(1, bench.steps // len(job.requests))}
    for number, forget in enumerate(job.requests):
        options = assembled(task.method, config)
        target = config["target"]
        if target in TAUGHT:
            taught, seconds = teacher(bench, job.name, where, number, target)
            sharpness, temperature = config.get("sharpness", SHARPNESS[target]), config.get("temperature", 1.0)
            options["forget_loss"] = Imitation(taught, sharpness, temperature=temperature)
            spent += seconds
        retain = job.retain_at(number)
        looking = None
        if task.arm.startswith("align"):
            own = options["method"].default_forget_loss("classification")
            looking = Cosines(forget, retain, options.get("forget_loss", own))
            options["forget_loss"] = looking.forget_loss
        began = time.process_time()
        fastlur.unlearn(
            model, forget, retain, progress=False, callbacks=[looking] if looking else [], **steps, **options
        )
        spent += time.process_time() - began
        if looking is not None:
            spent -= looking.seconds
            more["cosines"] = looking.found
    return model, spent, more


def assembled(method: str, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `unlearn` from plain JSON, but for targets that have to be trained."""
    settings = dict(config["method"])
    if config["trim"] is not None:
        settings["trim"] = Trim(config["trim"])
    if config["mask"] is not None:
        settings["mask"] = SaliencyMask(config["mask"])
    options: dict[str, Any] = {"method": METHODS[method](**settings), "schedule": config["schedule"]}
    if config["lr"] is not None:
        options["lr"] = config["lr"]
    if "max_grad_norm" in config:
        options["max_grad_norm"] = config["max_grad_norm"] or math.inf
    if config["target"] in MADE:
        options["forget_loss"] = MADE[config["target"]]()
    return options


def judged(model: nn.Module, job: Scenario) -> dict[str, Any]:
    """Everything the report needs of a model, so that nothing has to be judged again."""
    found = fastlur.evaluate(model, forget=job.forget, retain=job.retain, test=job.test)
    figures: dict[str, Any] = {name: round(getattr(found, name), 4) for name in (*FIGURES, "loss_auc")}
    if len(job.requests) > 1:
        figures["requests"] = [round(_error(model, each), 4) for each in job.requests]
    if job.triggered is not None:
        figures["attack"] = round(100 - _error(model, job.triggered), 4)
    return figures


def _error(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return 100 - 100 * float(scores(model, data, "data", 512).hit.mean())
