"""⟨a,b⟩, ‖a‖² and ‖b‖² in one read of a and b, per tensor and in total.

Each program adds up x·y, x·x and y·y over its blocks, lane by lane, then over the lanes; `finish` adds the programs'
sums in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .launch import contiguous, run
from .reduction import PARTIALS, finish
from .table import jit, locate, plan, pointer, read

BLOCK = 4096


@jit
def dot_kernel(
    a, b, partials, programs, origin, table, owner, width, size,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Leave this program's part of the three sums."""
    column, program, size = locate(table, owner, width, size)
    a = pointer(a, table, width, column, 0, ALIGNED)
    b = pointer(b, table, width, column, 1, ALIGNED)
    whole = size // BLOCK
    step = tl.minimum(tl.cdiv(size, BLOCK), PARTIALS)
    lanes = tl.arange(0, BLOCK)
    ab = tl.zeros((BLOCK,), COMPUTE)
    aa = tl.zeros((BLOCK,), COMPUTE)
    bb = tl.zeros((BLOCK,), COMPUTE)
    block = program
    while block < whole:
        x = read(a, block * BLOCK + lanes, None, COMPUTE)
        y = read(b, block * BLOCK + lanes, None, COMPUTE)
        ab += x * y
        aa += x * x
        bb += y * y
        block += step
    if whole % step == program:  # the blocks go round the programs, and the one that is not whole comes last
        offsets = whole * BLOCK + lanes
        x = read(a, offsets, offsets < size, COMPUTE)
        y = read(b, offsets, offsets < size, COMPUTE)
        ab += x * y
        aa += x * x
        bb += y * y
    at = partials + origin + tl.program_id(0)
    tl.store(at, tl.sum(ab).to(tl.float64))
    tl.store(at + programs, tl.sum(aa).to(tl.float64))
    tl.store(at + 2 * programs, tl.sum(bb).to(tl.float64))


def grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨a,b⟩, ‖a‖² and ‖b‖²: in total, shape (3,), and per tensor, shape (len(a), 3), both float64."""
    if not a and not b:
        total, each = (torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in ((3,), (0, 3)))
        return total, each
    with contiguous((a, b), written=0) as held:
        launches = plan(held, BLOCK, PARTIALS)
        partials = torch.empty(3, launches.programs, dtype=torch.float64, device=a[0].device)
        for group in launches.groups:
            scalars = (partials, launches.programs, group.origin)
            run(dot_kernel, held, group, scalars, BLOCK=BLOCK, PARTIALS=PARTIALS)
    return finish(partials, launches, len(a))
