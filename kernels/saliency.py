"""Scores for the trims: |g·θ|, or |g| without θ."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import elementwise
from .table import jit, locate, pointer, read

BLOCK = 4096


@triton.jit
def saliency_block(out, grad, theta, offsets, mask, COMPUTE: tl.constexpr):
    """Score one block."""
    score = read(grad, offsets, mask, COMPUTE)
    if theta is not None:
        score *= read(theta, offsets, mask, COMPUTE)
    tl.store(out + offsets, tl.abs(score), mask)


@jit
def saliency_kernel(
    out, grad, theta, table, owner, width, size,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score this program's block."""
    column, program, size = locate(table, owner, width, size)
    out = pointer(out, table, width, column, 0, ALIGNED)
    grad = pointer(grad, table, width, column, 1, ALIGNED)
    theta = pointer(theta, table, width, column, 2, ALIGNED)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    if (program + 1) * BLOCK <= size:
        saliency_block(out, grad, theta, offsets, None, COMPUTE)
    else:
        saliency_block(out, grad, theta, offsets, offsets < size, COMPUTE)


def saliency(out: Sequence[Tensor], grad: Sequence[Tensor], theta: Sequence[Tensor] | None) -> None:
    """out ← |g·θ|, or |g| without `theta`."""
    elementwise(saliency_kernel, (out, grad, theta), (), written=1, block=BLOCK)
