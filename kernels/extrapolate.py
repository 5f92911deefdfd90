"""MOX: θ ← η((1 + α)θ₀ − αθ_mem) + (1 − η)θ; at η = 1 the θ given is not read."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import elementwise
from .table import jit, locate, pointer, read

BLOCK = 4096


@triton.jit
def extrapolate_block(theta, theta0, memorised, alpha, eta, offsets, mask, COMPUTE: tl.constexpr):
    """Extrapolate one block."""
    near = read(theta0, offsets, mask, COMPUTE) * (1 + alpha).to(COMPUTE)
    away = near - read(memorised, offsets, mask, COMPUTE) * alpha.to(COMPUTE)
    if eta != 1:
        away = away * eta.to(COMPUTE) + read(theta, offsets, mask, COMPUTE) * (1 - eta).to(COMPUTE)
    tl.store(theta + offsets, away, mask)


@jit
def extrapolate_kernel(
    theta, theta0, memorised, alpha, eta, table, owner, width, size,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Extrapolate this program's block."""
    column, program, size = locate(table, owner, width, size)
    theta = pointer(theta, table, width, column, 0, ALIGNED)
    theta0 = pointer(theta0, table, width, column, 1, ALIGNED)
    memorised = pointer(memorised, table, width, column, 2, ALIGNED)
    alpha = tl.load(alpha).to(tl.float64)
    eta = tl.load(eta).to(tl.float64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    if (program + 1) * BLOCK <= size:
        extrapolate_block(theta, theta0, memorised, alpha, eta, offsets, None, COMPUTE)
    else:
        extrapolate_block(theta, theta0, memorised, alpha, eta, offsets, offsets < size, COMPUTE)


def extrapolate(
    theta: Sequence[Tensor], theta0: Sequence[Tensor], memorised: Sequence[Tensor], alpha: Tensor, eta: Tensor
) -> None:
    """θ ← η((1 + α)θ₀ − αθ_mem) + (1 − η)θ, in place; `alpha` and `eta` have shape () and are float64."""
    elementwise(extrapolate_kernel, (theta, theta0, memorised), (alpha, eta), written=1, block=BLOCK)
