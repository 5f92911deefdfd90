"""`python -m bench.quality`: plan the study, or do it."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:  # for `machine`, which lies beside
    sys.path.insert(0, str(HERE.parent))

from machine import machine  # noqa: E402

from .journal import Journal  # noqa: E402
from .networks import NETWORKS  # noqa: E402
from .plan import GRIDS  # noqa: E402
from .scenarios import SCENARIOS  # noqa: E402
from .splits import DATASETS  # noqa: E402
from .training import Bench  # noqa: E402
from .work import cost, counted, work  # noqa: E402

RESULTS = HERE / "results"


def main(arguments: list[str] | None = None) -> int:
    """Plan or work; the exit status is 1 where something is left to do."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--grid", choices=GRIDS, default="essential")
    parser.add_argument("--network", choices=NETWORKS, default="cnn")
    parser.add_argument("--dataset", choices=DATASETS, default="mnist")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only these (again for another one)")
    parser.add_argument("--arm", action="append", help="only these contenders (again for another one)")
    parser.add_argument("--trials", type=int, help="to tune every arm with")
    parser.add_argument("--truths", type=int, help="retrained models a final split")
    parser.add_argument("--hours", type=float, default=24.0, help="begin nothing new after that long")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--size", type=int, help="training images (default: all of a split)")
    parser.add_argument("--epochs", type=int, help="of training")
    parser.add_argument("--steps", type=int, default=150, help="of unlearning")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plan", action="store_true", help="only say what is missing, and what it will cost")
    given = parser.parse_args(arguments)
    grid = GRIDS[given.grid]
    if given.scenario:
        grid = replace(grid, scenarios=tuple(given.scenario))
    if given.arm:
        known = {**grid.arms, **grid.settings}
        if set(given.arm) - set(known):
            parser.error(f"--arm: the grid has {', '.join(known)}")
        grid = replace(
            grid,
            arms={name: arm for name, arm in grid.arms.items() if name in given.arm},
            settings={name: config for name, config in grid.settings.items() if name in given.arm},
        )
    if given.trials:
        grid = replace(grid, trials=given.trials)
    if given.truths:
        grid = replace(grid, truths=given.truths)
    bench = Bench(given.network, given.dataset, given.size, given.epochs, given.steps)
    journal = Journal(given.results / f"{bench.name}.jsonl")
    if given.plan:
        plan(grid, journal, given.cores)
        return 0
    if "machine" not in journal:
        journal.add({"key": "machine", **machine()})
    return 0 if work(bench, grid, journal, given.cores, 3600 * given.hours) else 1


def plan(grid: object, journal: Journal, cores: int) -> None:
    """Print what is missing, and its price where something of the kind has been done."""
    missing, each = counted(grid, journal), cost(journal)  # type: ignore[arg-type]
    total = 0.0
    for kind, number in missing.items():
        price = each.get("trial" if kind == "final" else kind)
        total += number * (price or 0.0)
        print(f"{number:5d} × {kind:9s}" + ("" if price is None else f" {price:7.1f} s"))
    if set(missing) <= {*each, *(("final",) if "trial" in each else ())}:
        print(f"about {total / 60 / cores:.0f} minutes on {cores} cores, and teachers for what will be chosen")
    elif missing:
        print("not every kind has been timed yet; run some of it to know what all of it costs")


if __name__ == "__main__":
    sys.exit(main())
