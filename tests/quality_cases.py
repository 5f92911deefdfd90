"""A study so small that it runs in seconds, and one without a model in it."""

from __future__ import annotations

from quality.contenders import ARMS
from quality.plan import Grid, stale, tasks
from quality.training import Bench
from quality.trial import perform

TINY = Bench("mlp", "digits", size=120, epochs=2, steps=3)
SMALL = Grid(("class", "backdoor"), {name: ARMS[name] for name in ("lur", "joint", "salun")}, trials=3)
FIGURES = {"ua": 10.0, "ra": 90.0, "ta": 80.0, "mia": 50.0}


def go_on(grid, journal, most=10_000):
    """The work in this process; how much of it was done."""
    for done in range(most):
        task = next(tasks(grid, journal), None)
        if task is None:
            return done
        journal.add(perform(TINY, task), anew=stale(task, journal))
    return most


def pretend(grid, journal, figures=lambda task: FIGURES):
    """A whole study without a model in it, and without a file."""
    while ready := list(tasks(grid, journal)):
        for task in ready:
            row = {**task.told, "seconds": 1.0, "rte": 1.0, "cpu": 1.0, **figures(task)}
            journal.rows[task.key] = row
    return journal
