"""Timing on a GPU: calls back to back, waited for together; launches as the profiler counts them; switches of TF32."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from measure import Times, interleaved

Arm = Callable[[], object]
SAMPLE = 2e-3  # seconds that a sample should last at least: the wait at its end is then about 1 % of it


def wait() -> None:
    """Until the device has done everything it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(arm: Arm) -> float:
    """Seconds of one call."""
    wait()
    began = time.perf_counter()
    arm()
    wait()
    return time.perf_counter() - began


def sampled(arms: Mapping[str, Arm], seconds: float, fewest: int = 5, most: int = 100) -> Times:
    """Seconds of a call of each arm, interleaved; what is short is called several times a sample, back to back.

    So the host runs ahead of the device where it can, as in a training loop, and what the host cannot hide counts.
    """
    calls = {}
    for name, arm in arms.items():
        arm()
        calls[name] = max(1, min(200, round(SAMPLE / max(once(arm), 1e-7))))

    def repeated(arm: Arm, count: int) -> Arm:
        def run() -> None:
            for _ in range(count):
                arm()

        return run

    times = interleaved({n: repeated(arm, calls[n]) for n, arm in arms.items()}, seconds, fewest, most)
    return {name: [spent / calls[name] for spent in each] for name, each in times.items()}


def spread(times: list[float]) -> list[float]:
    """Median and quartiles, seconds."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return [float(f"{x:.4g}") for x in (middle, low, high)]


def captured(arm: Arm) -> Arm:
    """The arm as a CUDA graph: what the device alone takes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        arm()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm()
    return graph.replay


def launches(arm: Arm) -> dict[str, int] | None:
    """What one call puts on the device, by name: kernels, copies and fills. None without a device."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    arm()
    wait()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        arm()
        wait()
    counted: dict[str, int] = {}
    for event in run.events():
        if event.is_user_annotation:  # the span of an optimizer's step, say, drawn on the device's line
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA and "sync" not in event.name.lower():
            name = event.name[:80]
            counted[name] = counted.get(name, 0) + 1
    return counted


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, float32 matrix products and convolutions may (or may not) be taken in TF32."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these switches are about to get new names
        before = [each.allow_tf32 for each in backends]
        try:
            for each in backends:
                each.allow_tf32 = allowed
            yield
        finally:
            for each, was in zip(backends, before, strict=True):
                each.allow_tf32 = was
