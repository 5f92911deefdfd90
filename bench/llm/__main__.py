"""`python -m bench.llm`: plan the study, or do it."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from .authors import SHARES
from .contenders import ARMS, ESSENTIAL, SUFFIXES, Journal, machine
from .models import RECIPES, smollm2_file
from .study import Study, tasks, work

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Plan or work; what is left when the time is up is said, and is no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench.llm", description=__doc__)
    parser.add_argument("--model", choices=RECIPES, default="tiny")
    parser.add_argument("--forget", type=float, choices=SHARES, default=0.1, help="the share of the authors")
    parser.add_argument("--methods", nargs="*", choices=ARMS, default=list(ESSENTIAL))
    parser.add_argument("--trials", type=int, default=0, help="to tune every method with, on other authors; 0: recipes")
    parser.add_argument("--truths", type=int, default=1, help="models that never saw the forget set")
    parser.add_argument("--early", type=int, nargs="+", default=[], help="epochs of retrainings that stop early")
    parser.add_argument("--hours", type=float, default=24.0, help="begin nothing new after that long")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--weights", type=Path, help="the GGUF file, or a folder with it (default: the package's)")
    parser.add_argument("--epochs", type=int, help="of fine-tuning; results then have a name of their own")
    parser.add_argument("--steps", type=int, help="of unlearning; likewise")
    parser.add_argument("--authors", type=int, help="likewise")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--plan", action="store_true", help="only say what is missing, and what it will cost")
    given = parser.parse_args(arguments)
    tries = [arm for arm in given.methods if arm.endswith(SUFFIXES)]
    if given.trials > 1 and tries:
        parser.error(f"--trials: {', '.join(tries)} are single settings; search the methods themselves")
    changes = {name: getattr(given, name) for name in ("epochs", "steps", "authors") if getattr(given, name)}
    recipe = replace(RECIPES[given.model], **changes)
    methods, early = tuple(given.methods), tuple(given.early)
    study = Study(given.model, given.forget, methods, given.trials, given.truths, recipe, given.weights, early)
    journal = Journal(given.results / f"{study.name}.jsonl")
    if given.plan:
        plan(study, journal)
        return 0
    if given.model == "smollm2":
        smollm2_file(given.weights)  # now rather than later
    import torch

    torch.set_num_threads(given.threads)
    if "machine" not in journal:
        journal.add({"key": "machine", **machine()})
    if not work(study, journal, 3600 * given.hours, lambda line: print(line, flush=True)):
        print("left to do:", *(task.key for task in tasks(study, journal)))
    return 0


def plan(study: Study, journal: Journal) -> None:
    """Print what is missing, and its price where something of the kind has been done."""
    spent: dict[str, list[float]] = {}
    for key, row in journal.rows.items():
        if "wall" in row:
            spent.setdefault(key.split("/")[0], []).append(row["wall"])
    for task in tasks(study, journal):
        known = spent.get(task.kind) or spent.get("trial" if task.kind == "final" else "final")
        print(task.key + ("" if known is None else f": about {statistics.median(known) / 60:.1f} minutes"))


if __name__ == "__main__":
    sys.exit(main())
