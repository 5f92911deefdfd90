"""Whole runs to the same gap on scikit-learn's digits, LUR against ScissorHands: see `whole`.

The short form is one seed, one length and one learning rate for every arm; FASTLUR_BENCH_FULL=1 takes three seeds, four
lengths and three rates. LUR's defaults were chosen on MNIST; ScissorHands has its published learning rate, weights and
loss (an arm has LUR's loss), and is trimmed and repaired in all layers.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from whole import ARMS, CLEANED, LUR, PUBLISHED, Job, run, verdict

from fastlur import demo

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SEEDS = (10, 11, 12) if FULL else (10,)
RATES = (1.0, 0.3, 3.0) if FULL else (1.0,)
STEPS = (100, 50, 25, 12) if FULL else (25,)
EPOCHS = demo.EPOCHS


def job(seed: int) -> Job:
    """The network of the demo, trained with 5 % wrong labels, and retrained without those images."""
    found = demo.scenario("mislabelled", seed)
    images, labels = (torch.cat(each) for each in zip(found.forget, found.retain, strict=True))
    model = demo.train((images, labels), EPOCHS, seed)
    return Job(model, found.forget, found.retain, found.test, demo.train(found.retain, EPOCHS, seed + 100))


def test_whole_runs(benchmark: Any, record: list[dict[str, Any]]) -> None:
    runs: list[dict[str, Any]] = []

    def everything() -> None:
        for seed in SEEDS:
            made = job(seed)
            run(made, PUBLISHED, 1.0, steps=2)  # what is done once a process is nobody's
            for steps in STEPS:
                for rate in RATES:
                    runs.extend({"seed": seed, **run(made, arm, rate, steps=steps, seed=seed)} for arm in ARMS)

    benchmark.pedantic(everything, rounds=1)
    found = verdict(runs, (PUBLISHED, CLEANED, LUR))
    record += [{"to_the_gap": found}, *runs]
    benchmark.extra_info.update(found)
    for label, each in found.items():
        print(f"\nto a gap of {each['gap']} ({label}), seconds: {each['seconds']}")
