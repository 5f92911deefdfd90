"""The second stage of every sum: partial sums, one a program, are added in a fixed order, in float64.

The number of partial sums depends on the sizes alone, and nothing is added atomically, so the same data give the same
bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS
from .table import Plan

PARTIALS = 1024  # programs a tensor at most: about two waves of four on each of an H100's 132 multiprocessors
ADDED = 1024


@triton.jit(do_not_specialize=["tensors", "programs"])
def finish_kernel(total, each, partials, ranges, tensors, programs, ADDED: tl.constexpr):
    """each[t, k] = Σ partials[k, of tensor t], and by the last program total[k] = Σ partials[k, :]."""
    tensor = tl.program_id(0)
    value = tl.program_id(1)
    start = tl.cast(0, tl.int64)
    count = programs.to(tl.int64)
    if ranges is not None and tensor < tensors:
        start = tl.load(ranges + 2 * tensor)
        count = tl.load(ranges + 2 * tensor + 1)
    partials += value * programs.to(tl.int64) + start
    lanes = tl.arange(0, ADDED)
    added = tl.zeros((ADDED,), tl.float64)
    at = count * 0
    while at < count:
        added += tl.load(partials + at + lanes, at + lanes < count, other=0.0)
        at += ADDED
    result = tl.sum(added)
    if tensor < tensors:
        tl.store(each + tensor * tl.num_programs(1) + value, result)
    else:
        tl.store(total + value, result)


def finish(partials: Tensor, plan: Plan, tensors: int) -> tuple[Tensor, Tensor]:
    """Totals, shape (k,), and sums per tensor, shape (tensors, k), float64, from partial sums (k, programs)."""
    total = partials.new_empty(len(partials))
    each = partials.new_empty(tensors, len(partials))
    with torch.cuda.device_of(partials):
        finish_kernel[(tensors + 1, len(partials))](
            total, each, partials, plan.ranges if tensors else None, tensors, plan.programs, ADDED=ADDED, **OPTIONS
        )
    return total, each
