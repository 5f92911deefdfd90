"""out = θ − αd, or θ − (α/‖v‖)d where ‖v‖² is given, with α/‖v‖ = 0 at ‖v‖ = 0 and ∞.

By a factor of 0 the point does not move, whatever d holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import elementwise
from .table import jit, locate, pointer, read

BLOCK = 4096


@triton.jit
def displace_block(out, theta, d, alpha, offsets, mask, COMPUTE: tl.constexpr):
    """Displace one block."""
    point = read(theta, offsets, mask, COMPUTE)
    moved = point - read(d, offsets, mask, COMPUTE) * alpha
    tl.store(out + offsets, tl.where(alpha != 0, moved, point), mask)  # 0·∞ would be NaN


@jit
def displace_kernel(
    out, theta, d, alpha, norm2, table, owner, width, size,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Displace this program's block."""
    column, program, size = locate(table, owner, width, size)
    out = pointer(out, table, width, column, 0, ALIGNED)
    theta = pointer(theta, table, width, column, 1, ALIGNED)
    d = pointer(d, table, width, column, 2, ALIGNED)
    factor = tl.load(alpha).to(tl.float64)
    if norm2 is not None:
        square = tl.load(norm2).to(tl.float64)
        factor = tl.where(square > 0, factor / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    factor = factor.to(COMPUTE)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    if (program + 1) * BLOCK <= size:
        displace_block(out, theta, d, factor, offsets, None, COMPUTE)
    else:
        displace_block(out, theta, d, factor, offsets, offsets < size, COMPUTE)


def displace(
    out: Sequence[Tensor], theta: Sequence[Tensor], d: Sequence[Tensor], alpha: Tensor, norm2: Tensor | None = None
) -> None:
    """out ← θ − αd; with `norm2` = ‖v‖² of some v, α is divided by ‖v‖, and is 0 where that norm is 0."""
    elementwise(displace_kernel, (out, theta, d), (alpha, norm2), written=1, block=BLOCK)
