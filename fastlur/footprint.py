"""What a piece of work takes: memory at most, and time.

On CUDA the allocator keeps the peak itself. On the CPU it only reports every allocation and release to torch's
profiler; their running sum is the same thing, and it sees what the hooks on saved tensors do not: temporaries inside an
operation, such as a convolution's operands in another layout.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import profile, record_function

from fastlur.errors import ArgumentError

Work = Callable[[], object]
PART = "fastlur: part"
QUIET = {"KINETO_LOG_LEVEL": "99"}  # the profiler writes to standard error otherwise; read when it is first used


class Memory(NamedTuple):
    """Bytes beyond what there was before the first piece of work.

    Attributes:
        peak: at most, during this piece.
        left: after it.
    """

    peak: int
    left: int


def memory(parts: Sequence[Work], device: torch.device) -> list[Memory]:
    """Do pieces of work, one after the other; the memory that each of them takes on the device.

    What was allocated before must not be released by them.

    Raises:
        ArgumentError: a device that cannot be asked, or torch's profiler is already at work.
    """
    if device.type == "cuda":
        return [_on_cuda(part, base, device) for base in [torch.cuda.memory_allocated(device)] for part in parts]
    if device.type != "cpu":
        raise ArgumentError(f"model: is on {device}; memory can be measured on the CPU and on CUDA devices only")
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise ArgumentError("estimate: a profiler is running, and there can be only one; estimate before or after it")
    with _quiet(), profile(profile_memory=True) as profiler:
        for part in parts:
            with record_function(PART):
                part()
    return _read(profiler)


def seconds(work: Work, device: torch.device) -> float:
    """How long a piece of work takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def _on_cuda(part: Work, base: int, device: torch.device) -> Memory:
    torch.cuda.reset_peak_memory_stats(device)
    part()
    return Memory(torch.cuda.max_memory_allocated(device) - base, torch.cuda.memory_allocated(device) - base)


def _read(profiler: Any) -> list[Memory]:
    """The running sum of allocations, cut at the ends of the parts."""
    events = profiler.kineto_results.events()
    ends = sorted(event.start_ns() + event.duration_ns() for event in events if event.name() == PART)
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda change: change[0]
    )
    found: list[Memory] = []
    live = peak = 0
    for when, size in changes:
        while len(found) < len(ends) - 1 and when > ends[len(found)]:
            found.append(Memory(peak, live))
            peak = live
        live += size
        peak = max(peak, live)
    return [*found, *[Memory(peak, live)] * (len(ends) - len(found))]


@contextmanager
def _quiet() -> Iterator[None]:
    added = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def peak_memory(device: torch.device) -> int:
    """Bytes at most: what this process held on the CPU, or what was allocated on the device since it was last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on every platform
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
