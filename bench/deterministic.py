"""What `deterministic=True` costs: `python -m bench.deterministic` prints and keeps the ratio of two runs' times.

Interleaved runs of `unlearn` with and without it on the demo's network, after one of each that does not count.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import torch

import fastlur
from bench.machine import dumped, machine
from fastlur.demo import residual_cnn, scenario

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Rounds of pairs; the ratio is taken within each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    job = scenario("class", 0)
    torch.manual_seed(0)
    start = residual_cnn().to(where)
    ratios = []
    for number in range(chosen.rounds + 1):
        seconds = {}
        for wanted in (False, True) if number % 2 else (True, False):
            result = fastlur.unlearn(
                copy.deepcopy(start), job.forget, job.retain, steps=chosen.steps, deterministic=wanted, progress=False
            )
            seconds[wanted] = result.seconds
        if number:
            ratios.append(seconds[True] / seconds[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    row = {"network": "demo", "steps": chosen.steps, "rounds": chosen.rounds, "ratio": [middle, low, high]}
    print(f"deterministic=True takes {middle:.2f} times as long, quartiles [{low:.2f}, {high:.2f}], on {where}")
    (RESULTS / f"{where}-deterministic.json").write_text(dumped(machine(), [row]))


if __name__ == "__main__":
    main()
