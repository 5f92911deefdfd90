"""Timing that holds on a machine that drifts: all arms in one run, round by round, and ratios within the rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Times = dict[str, list[float]]


def interleaved(arms: Mapping[str, Callable[[], object]], seconds: float, fewest: int = 5, most: int = 200) -> Times:
    """Seconds of every call of each arm: rounds of all of them, each in another order, until the time is up.

    In one fixed order an arm would always find the caches and the heap as the same other arm left them. Every arm runs
    twice before the clock starts. On CUDA each call is waited for.

    Args:
        arms: what to call, by name.
        seconds: how long to go on.
        fewest: rounds to make however long they take.
        most: rounds to stop after.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(2):
        for arm in arms.values():
            arm()
    times: Times = {name: [] for name in arms}
    order, shuffle = list(arms.items()), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for made in range(most):
        if made >= fewest and time.perf_counter() > end:
            break
        shuffle(order)
        for name, arm in order:
            wait()
            began = time.perf_counter()
            arm()
            wait()
            times[name].append(time.perf_counter() - began)
    return times


def medians(times: Times) -> dict[str, float]:
    """The median seconds of each arm."""
    return {name: statistics.median(each) for name, each in times.items()}


def ratio(times: Times, arm: str, base: str) -> tuple[float, float, float]:
    """Median and quartiles of arm ÷ base, taken round by round."""
    rounds = [x / y for x, y in zip(times[arm], times[base], strict=True)]
    low, middle, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else (rounds[0],) * 3
    return middle, low, high
