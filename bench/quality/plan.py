"""What a study consists of, and what of it can be done next. What is chosen depends on tuning alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .contenders import ALIGNMENT, ARMS, DEFAULT, ESSENTIAL, WEIGHED, candidates, weights
from .journal import Journal, Row
from .points import LENT, Arm
from .scenarios import SCENARIOS
from .splits import FINAL, TUNING
from .trial import FIGURES, TAUGHT, Task


@dataclass(frozen=True)
class Grid:
    """A study.

    Attributes:
        scenarios: of `SCENARIOS`.
        arms: the contenders, each with its space.
        trials: how many each arm has to be tuned with, the default setting among them; the same for all. What takes a
            forget loss of the user's has LUR's defaults for one more.
        finals: the splits that what was chosen is judged on, once.
        truths: how many retrained models a final split has. Everything is compared with the first; a second one says
            how far truth is from itself.
        settings: configurations of LUR that are compared as they are on the tuning splits, by name.
    """

    scenarios: tuple[str, ...] = SCENARIOS
    arms: dict[str, Arm] = field(default_factory=dict)
    trials: int = 6
    finals: tuple[str, ...] = FINAL
    truths: int = 2
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def numbers(self, name: str) -> list[int | str]:
        """The trials of an arm."""
        return self.arms[name].numbers(self.trials)


GRIDS = {
    "essential": Grid(arms={name: ARMS[name] for name in ESSENTIAL}),
    "full": Grid(arms=ARMS),
    "alignment": Grid(arms=ALIGNMENT),
    "weighed": Grid(arms=WEIGHED),
    "targets": Grid(settings=candidates()),
    "weights": Grid(settings=weights()),
    "default": Grid(arms={DEFAULT: Arm("lur")}, trials=1),
}


def tasks(grid: Grid, journal: Journal) -> Iterator[Task]:
    """Everything that is missing and whose needs are met, in the order in which it is wanted."""
    for task in _all(grid, journal):
        wanted = task.key not in journal or stale(task, journal)
        if wanted and all(need.key in journal for need in needs(task)):
            yield task


def stale(task: Task, journal: Journal) -> bool:
    """Whether the row that there is was made with other settings: others were chosen, or LUR's defaults were others."""
    row = journal.rows.get(task.key)
    return row is not None and (row.get("config"), row.get("defaults")) != (task.config, task.defaults)


def needs(task: Task) -> list[Task]:
    """What has to be there before: so that no two processes train the same model."""
    if task.kind in ("original", "truth"):
        return []
    found = [origin(task.scenario, task.split)]
    if task.config is not None and task.config["target"] in TAUGHT:
        found += teachers(task.scenario, task.split, task.config["target"])
    return found


def origin(scenario: str, split: str) -> Task:
    """The training of a model as given; scenarios on the same data share one."""
    return Task("original", scenario if scenario in ("mislabelled", "backdoor") else "clean", split)


def teachers(scenario: str, split: str, kind: str) -> list[Task]:
    """One for each request."""
    return [Task("teacher", scenario, split, kind, number) for number in range(3 if scenario == "continual" else 1)]


def chosen(arm: str, scenario: str, journal: Journal, numbers: Sequence[int | str]) -> Row | None:
    """The trial of the smallest gap on the tuning split; None while trials are missing. Of equals the first."""
    rows = [journal.rows.get(f"trial/{scenario}/{TUNING[0]}/{arm}/{number}") for number in numbers]
    reference = truth(scenario, TUNING[0], journal)
    if reference is None or any(row is None for row in rows):
        return None
    return min((row for row in rows if row is not None), key=lambda row: gap(row, reference))


def truth(scenario: str, split: str, journal: Journal, number: int = 0) -> Row | None:
    """The figures of a model retrained for a split: of the first, that everything is compared with, or of another."""
    return journal.rows.get(Task("truth", scenario, split, "", number).key)


def gap(row: Row, reference: Row) -> float:
    """Mean distance over UA, RA, TA and MIA to the retrained model, in points; ∞ for a run that failed."""
    if "error" in row:
        return math.inf
    return sum(abs(float(row[name]) - float(reference[name])) for name in FIGURES) / len(FIGURES)


def _all(grid: Grid, journal: Journal) -> Iterator[Task]:
    for scenario in grid.scenarios:
        splits = [*(TUNING[:1] if grid.arms else ()), *(TUNING if grid.settings else ())]
        yield from _ground(grid, scenario, list(dict.fromkeys(splits)), grid.arms, journal)
        trials = {name: _trials(grid, scenario, name) for name in grid.arms}
        for number in (*range(grid.trials), LENT):
            for each in trials.values():
                yield from (task for task in each if task.number == number)
        for name, config in grid.settings.items():
            for split in TUNING:
                yield Task("trial", scenario, split, name, 0, config, "lur")
        yield from _ground(grid, scenario, list(grid.finals if grid.arms else ()), grid.arms, journal)
        for name, arm in grid.arms.items():
            if any(stale(task, journal) for task in trials[name]):
                continue
            best = chosen(name, scenario, journal, grid.numbers(name))
            for split in grid.finals if best is not None else ():
                assert best is not None
                yield Task("final", scenario, split, name, 0, best["config"], arm.method)


def _trials(grid: Grid, scenario: str, name: str) -> list[Task]:
    """What an arm is tuned with."""
    arm, where = grid.arms[name], TUNING[0]
    return [Task("trial", scenario, where, name, n, arm.config(n), arm.method) for n in grid.numbers(name)]


def _ground(grid: Grid, scenario: str, splits: list[str], arms: dict[str, Arm], journal: Journal) -> Iterator[Task]:
    """What every comparison on these splits stands on."""
    for split in splits:
        yield origin(scenario, split)
    for split in splits:
        for number in range(1 if split in TUNING else grid.truths):
            yield Task("truth", scenario, split, "", number)
        for kind in _kinds(grid, scenario, split, journal):
            yield from teachers(scenario, split, kind)
        yield Task("before", scenario, split)


def _kinds(grid: Grid, scenario: str, split: str, journal: Journal) -> list[str]:
    """The kinds of teachers that are asked on a split."""
    if split in TUNING:
        tried = [arm.config(number) for name, arm in grid.arms.items() for number in grid.numbers(name)]
        wanted = [config["target"] for config in (*tried, *grid.settings.values())]
    else:
        best = [chosen(name, scenario, journal, grid.numbers(name)) for name in grid.arms]
        wanted = [row["config"]["target"] for row in best if row is not None]
    return [kind for kind in TAUGHT if kind in wanted]
