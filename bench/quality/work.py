"""Doing what is planned: one process a core, each of one thread, and one that writes the journal."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch

from .journal import Journal, Row
from .plan import Grid, stale, tasks
from .training import Bench
from .trial import Task, perform

THREADS = "OMP_NUM_THREADS"


def work(
    bench: Bench,
    grid: Grid,
    journal: Journal,
    cores: int,
    seconds: float,
    said: Callable[[str], None] = print,
) -> bool:
    """Do what is missing until nothing is or the time is up; whether all is done.

    What is under way when the time is up is finished and written down.
    """
    end = time.monotonic() + seconds
    os.environ[THREADS] = "1"  # for the processes to come
    running: dict[Future[Row], Task] = {}
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn"), initializer=_alone) as pool:
        while True:
            under_way = {task.key for task in running.values()}
            if time.monotonic() < end:
                for task in tasks(grid, journal):
                    if len(running) >= cores:
                        break
                    if task.key not in under_way:
                        running[pool.submit(perform, bench, task)] = task
                        under_way.add(task.key)
            if not running:
                return next(tasks(grid, journal), None) is None
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                journal.add(future.result(), anew=stale(task, journal))
                said(f"{task.key}: {journal.rows[task.key]['cpu']:.1f} s")


def _alone() -> None:
    torch.set_num_threads(1)


def cost(journal: Journal) -> dict[str, float]:
    """Median seconds of the processor of every kind of task that has been done."""
    spent: dict[str, list[float]] = {}
    for key, row in journal.rows.items():
        if "cpu" in row:
            kind = key.split("/")[0]
            spent.setdefault("trial" if kind == "final" else kind, []).append(row["cpu"])
    return {kind: statistics.median(each) for kind, each in spent.items()}


def counted(grid: Grid, journal: Journal) -> dict[str, int]:
    """How many tasks of every kind are missing, those that cannot begin yet included."""
    everything: dict[str, int] = {}
    pretend = _Pretending(journal)
    while True:
        ready = list(tasks(grid, pretend))
        if not ready:
            return everything
        for task in ready:
            everything[task.kind] = everything.get(task.kind, 0) + 1
            figures = dict.fromkeys(("ua", "ra", "ta", "mia"), 0.0)
            pretend.rows[task.key] = {**task.told, **figures}


class _Pretending(Journal):
    """A journal in memory, to count what is to come; which trial is chosen does not matter for that."""

    def __init__(self, journal: Journal) -> None:
        self.path, self.rows = journal.path, dict(journal.rows)
