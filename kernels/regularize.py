"""P(θ) = ½·l2‖θ‖² + l1‖θ‖₁ + ½·prox·Σ F (θ − θ₀)², and grad ← grad + ∇P(θ), in one pass.

∇P(θ) = l2·θ + l1·sign θ + prox·F (θ − θ₀). Without F, F = 1; without θ₀ the last term is absent, as is each term
whose factor is 0, whatever its operands are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import contiguous, run
from .layout import L1, PROX, WEIGHT_DECAY
from .reduction import PARTIALS, finish
from .table import jit, locate, plan, pointer, read

BLOCK = 2048


@triton.jit
def present(factor, term):
    """The term, or 0 where its factor is 0: 0·∞ would be NaN."""
    return tl.where(factor != 0, term, 0.0)


@triton.jit
def penalty(theta, theta0, fisher, l2, l1, prox):
    """Gradient and value of P, element by element; θ₀ and F may be None."""
    sign = (theta > 0).to(theta.dtype) - (theta < 0).to(theta.dtype)
    gradient = present(l2, theta * l2) + present(l1, sign * l1)
    value = present(l2, 0.5 * l2 * (theta * theta)) + present(l1, l1 * tl.abs(theta))
    if theta0 is not None:
        away = theta - theta0
        pull = away
        if fisher is not None:
            pull = away * fisher
        gradient += present(prox, pull * prox)
        value += present(prox, 0.5 * prox * (pull * away))
    return gradient, value


@triton.jit
def regularize_block(grad, theta, theta0, fisher, l2, l1, prox, offsets, mask, COMPUTE: tl.constexpr):
    """Add ∇P to one block of the gradient and return P, element by element, 0 beyond the end."""
    weight = read(theta, offsets, mask, COMPUTE)
    anchor = read(theta0, offsets, mask, COMPUTE)
    gradient, value = penalty(weight, anchor, read(fisher, offsets, mask, COMPUTE), l2, l1, prox)
    tl.store(grad + offsets, read(grad, offsets, mask, COMPUTE) + gradient, mask)
    return value


@jit
def regularize_kernel(
    grad, theta, theta0, fisher, hyper, partials, origin, table, owner, width, size,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """Add ∇P to every block of this program's share, and leave the share's part of P."""
    column, program, size = locate(table, owner, width, size)
    grad = pointer(grad, table, width, column, 0, ALIGNED)
    theta = pointer(theta, table, width, column, 1, ALIGNED)
    theta0 = pointer(theta0, table, width, column, 2, ALIGNED)
    fisher = pointer(fisher, table, width, column, 3, ALIGNED)
    l2 = tl.load(hyper + WEIGHT_DECAY).to(COMPUTE)
    l1 = tl.load(hyper + L1).to(COMPUTE)
    prox = tl.load(hyper + PROX).to(COMPUTE)
    whole = size // BLOCK
    step = tl.minimum(tl.cdiv(size, BLOCK), PARTIALS)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), COMPUTE)
    block = program
    while block < whole:
        total += regularize_block(grad, theta, theta0, fisher, l2, l1, prox, block * BLOCK + lanes, None, COMPUTE)
        block += step
    if whole % step == program:
        offsets = whole * BLOCK + lanes
        total += regularize_block(grad, theta, theta0, fisher, l2, l1, prox, offsets, offsets < size, COMPUTE)
    tl.store(partials + origin + tl.program_id(0), tl.sum(total).to(tl.float64))


def regularize(
    grad: Sequence[Tensor],
    theta: Sequence[Tensor],
    theta0: Sequence[Tensor] | None,
    fisher: Sequence[Tensor] | None,
    hyper: Tensor,
) -> Tensor:
    """grad ← grad + ∇P(θ); returns P(θ), shape (), float64.

    l2, l1 and prox stand in `hyper` at WEIGHT_DECAY, L1 and PROX.
    """
    if not any((grad, theta, theta0, fisher)):
        return torch.zeros((), dtype=torch.float64, device=hyper.device)
    lists = (grad, theta, theta0, fisher if theta0 is not None else None)
    with contiguous(lists, written=1) as held:
        launches = plan(held, BLOCK, PARTIALS)
        partials = torch.empty(1, launches.programs, dtype=torch.float64, device=hyper.device)
        for group in launches.groups:
            scalars = (hyper.contiguous(), partials, group.origin)
            run(regularize_kernel, held, group, scalars, BLOCK=BLOCK, PARTIALS=PARTIALS)
    return finish(partials, launches, 0)[0].view(())
