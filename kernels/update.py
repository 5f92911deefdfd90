"""One optimizer step along a + u: combine, clip, regularise, mask, then SGD with momentum or AdamW, in one pass.

    g = c(a + u) + l1·sign θ + prox·F (θ − θ₀), c the clip factor; for SGD also + l2·θ
    SGD     m ← μm + g,  θ ← θ − lr·m
    AdamW   m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²
            θ ← (1 − lr·l2)θ − lr·(m/(1 − β₁ⁿ)) / (√(v/(1 − β₂ⁿ)) + ε),  n the number of steps taken, 1 at least

Nothing is even read where the control flag is down; where the mask is False neither weights nor moments change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import elementwise
from .layout import BETA2, COUNT, EPS, L1, LR, MOMENTUM, OK, PROX, SCALE, WEIGHT_DECAY
from .regularize import penalty
from .table import jit, locate, pointer, read

BLOCK = 2048


@triton.jit
def correction(beta, count):
    """1 − βⁿ in float64, by squaring: a dozen products, where an exponential would weigh on every program."""
    left = count.to(tl.int64)
    power = beta * 0 + 1
    while left > 0:
        power = tl.where(left % 2 == 1, power * beta, power)
        beta *= beta
        left = left // 2
    return 1 - power


@triton.jit
def put(pointer, offsets, mask, old, new, keep):
    """Write, the old values where `keep` is 0: stores of whole vectors are wide, stores under a mask are not."""
    if keep is not None:
        new = tl.where(keep != 0, new, old)
    tl.store(pointer + offsets, new, mask)


@triton.jit
def update_block(
    theta, moment1, moment2, a, u, theta0, fisher, keep, control, hyper, offsets, mask, COMPUTE: tl.constexpr
):
    """Update one block."""
    lr = tl.load(hyper + LR)
    beta1 = tl.load(hyper + MOMENTUM)
    decay = tl.load(hyper + WEIGHT_DECAY)
    l2 = decay if moment2 is None else decay * 0
    weight = read(theta, offsets, mask, COMPUTE)
    g = read(a, offsets, mask, COMPUTE)
    if u is not None:
        g += read(u, offsets, mask, COMPUTE)
    g *= tl.load(control + SCALE).to(COMPUTE)
    anchor = read(theta0, offsets, mask, COMPUTE)
    importance = read(fisher, offsets, mask, COMPUTE)
    l1 = tl.load(hyper + L1).to(COMPUTE)
    prox = tl.load(hyper + PROX).to(COMPUTE)
    gradient, _ = penalty(weight, anchor, importance, l2.to(COMPUTE), l1, prox)
    g += gradient
    if keep is not None:
        keep = tl.load(keep + offsets, mask, other=0) if mask is not None else tl.load(keep + offsets)
    m = read(moment1, offsets, mask, COMPUTE)
    first = m * beta1.to(COMPUTE)
    if moment2 is None:
        first += g
        moved = weight - first * lr.to(COMPUTE)
    else:
        beta2 = tl.load(hyper + BETA2)
        count = tl.maximum(tl.load(control + COUNT), 1.0)  # before a step was counted, as in the first
        first += g * (1 - beta1).to(COMPUTE)
        v = read(moment2, offsets, mask, COMPUTE)
        second = v * beta2.to(COMPUTE) + g * g * (1 - beta2).to(COMPUTE)
        root = tl.sqrt(second / correction(beta2, count).to(COMPUTE)) + tl.load(hyper + EPS).to(COMPUTE)
        away = first / correction(beta1, count).to(COMPUTE) / root
        moved = weight * (1 - lr * decay).to(COMPUTE) - away * lr.to(COMPUTE)
        put(moment2, offsets, mask, v, second, keep)
    put(theta, offsets, mask, weight, moved, keep)
    put(moment1, offsets, mask, m, first, keep)


@jit
def update_kernel(
    theta, moment1, moment2, a, u, theta0, fisher, keep, control, hyper, table, owner, width, size,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update this program's block, unless the control flag is down."""
    column, program, size = locate(table, owner, width, size)
    theta = pointer(theta, table, width, column, 0, ALIGNED)
    moment1 = pointer(moment1, table, width, column, 1, ALIGNED)
    moment2 = pointer(moment2, table, width, column, 2, ALIGNED)
    a = pointer(a, table, width, column, 3, ALIGNED)
    u = pointer(u, table, width, column, 4, ALIGNED)
    theta0 = pointer(theta0, table, width, column, 5, ALIGNED)
    fisher = pointer(fisher, table, width, column, 6, ALIGNED)
    keep = pointer(keep, table, width, column, 7, ALIGNED)
    if tl.load(control + OK) > 0:
        offsets = program * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < size
        if (program + 1) * BLOCK <= size:
            update_block(theta, moment1, moment2, a, u, theta0, fisher, keep, control, hyper, offsets, None, COMPUTE)
        else:
            update_block(theta, moment1, moment2, a, u, theta0, fisher, keep, control, hyper, offsets, mask, COMPUTE)


def meta_update(
    theta: Sequence[Tensor],
    a: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    moment1: Sequence[Tensor],
    moment2: Sequence[Tensor] | None,
    theta0: Sequence[Tensor] | None,
    fisher: Sequence[Tensor] | None,
    mask: Sequence[Tensor] | None,
    control: Tensor,
    hyper: Tensor,
) -> None:
    """One optimizer step along a + u, in place; SGD with momentum where `moment2` is None, else AdamW.

    Where `mask` is False, and everywhere when control[OK] is 0, neither weights nor moments change. `control`, shape
    (3,), and `hyper`, shape (8,), are float64.
    """
    if mask is not None:
        mask = [(x if x.dtype in (torch.bool, torch.uint8) else x != 0).view(torch.uint8) for x in mask]
    elementwise(
        update_kernel,
        (theta, moment1, moment2, a, u, theta0, fisher if theta0 is not None else None, mask),
        (control.contiguous(), hyper.contiguous()),
        written=3,
        block=BLOCK,
    )
