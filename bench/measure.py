"""Timing that holds on a machine that drifts: all arms in one run, in turn, medians, and ratios of those."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(arms: dict[str, Callable[[], object]], seconds: float, most: int = 200) -> dict[str, float]:
    """Median seconds of each arm, called in turn A B C A B C … until the time is up (at least five rounds).

    Every arm runs twice before the clock starts. On CUDA each call is waited for.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(2):
        for arm in arms.values():
            arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 5 or (time.perf_counter() < end and len(next(iter(times.values()))) < most):
        for name, arm in arms.items():
            wait()
            began = time.perf_counter()
            arm()
            wait()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times.items()}
