"""Conflict removal: a ← a + s·b, b ← b + t·a, both from the values given, decided on the device.

With (p, q, r) = (⟨a,b⟩, ‖a‖², ‖b‖²) and p < 0

    one_sided      s = 0       t = −p/q
    symmetric      s = −p/r    t = −p/q
    scissorhands   s = 0       t = max(½, −p/(q + 10⁻³))

and s = t = 0 otherwise, in which case neither a nor b is even read. A factor of 0 leaves its vector as it is, even
where the other is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import elementwise
from .table import jit, locate, pointer, read

BLOCK = 4096
KINDS = ("one_sided", "symmetric", "scissorhands")


@triton.jit
def ratio(ab, square):
    """−ab/square where that removes a conflict, else 0."""
    use = (ab < 0) & (square > 0)
    return tl.where(use, -ab / tl.where(use, square, 1.0), 0.0)


@triton.jit
def project_block(b, a, t, s, offsets, mask, SYMMETRIC: tl.constexpr, COMPUTE: tl.constexpr):
    """Project one block; a is written only where s may differ from 0."""
    x = read(a, offsets, mask, COMPUTE)
    y = read(b, offsets, mask, COMPUTE)
    tl.store(b + offsets, tl.where(t != 0, y + x * t, y), mask)
    if SYMMETRIC:
        tl.store(a + offsets, tl.where(s != 0, x + y * s, x), mask)


@jit
def project_kernel(
    b, a, dots, table, owner, width, size,
    KIND: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Project this program's block of a and b, unless there is no conflict."""
    column, program, size = locate(table, owner, width, size)
    b = pointer(b, table, width, column, 0, ALIGNED)
    a = pointer(a, table, width, column, 1, ALIGNED)
    ab = tl.load(dots).to(tl.float64)
    aa = tl.load(dots + 1).to(tl.float64)
    s = ab * 0
    if KIND == "scissorhands":
        t = -ab / (aa + 1e-3)
        t = tl.where(ab < 0, tl.where(t < 0.5, 0.5, t), 0.0)
    else:
        t = ratio(ab, aa)
        if KIND == "symmetric":
            s = ratio(ab, tl.load(dots + 2).to(tl.float64))
    if (s != 0) | (t != 0):
        offsets = program * BLOCK + tl.arange(0, BLOCK)
        if (program + 1) * BLOCK <= size:
            project_block(b, a, t.to(COMPUTE), s.to(COMPUTE), offsets, None, KIND == "symmetric", COMPUTE)
        else:
            project_block(b, a, t.to(COMPUTE), s.to(COMPUTE), offsets, offsets < size, KIND == "symmetric", COMPUTE)


def project(a: Sequence[Tensor], b: Sequence[Tensor], dots: Tensor, kind: str) -> None:
    """Remove the conflict between a and b, in place, from dots = (⟨a,b⟩, ‖a‖², ‖b‖²), shape (3,), float64.

    `kind` is "one_sided", "symmetric" or "scissorhands"; where ⟨a,b⟩ ≥ 0 nothing changes.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no projection; use 'one_sided', 'symmetric' or 'scissorhands'")
    written = 2 if kind == "symmetric" else 1
    elementwise(project_kernel, (b, a), (dots.contiguous(),), written=written, block=BLOCK, KIND=kind)
