"""The vector operations written down once more in float64, a few lines each, and what their roundings may amount to.

Nothing here comes from fastlur. An oracle takes the operands at one place of the lists, in float64, and returns pairs:
a value, and the sum of the absolute terms it was computed from, which is what rounding errors are relative to.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGE = 2**20 + 3
SHAPES = {0: (2, 3, 0, 1), 1: (1, 1, 1, 1), 63: (1, 7, 3, 3), 1023: (1, 11, 3, 31), 1025: (1, 5, 5, 41)}
SHAPES |= {LARGE: (7, 163, 1, 919), 2**17: (2, 8, 64, 128)}
LAYOUTS = ("guarded", "transposed", "sliced", "channels_last")
CROWD = [1, 0, 63, 1, 1023, 0, 1] * 12
CROWD += [2**17, *CROWD]
# (sizes, layout, dtype); "mixed" takes another layout at each place, and at the same place of the next list; "every"
# takes another dtype at each place
CASES = [([size], "guarded", dtype) for size in (0, 1, LARGE) for dtype in DTYPES]
CASES += [([size], layout, dtype) for size in (63, 1023, 1025) for layout in LAYOUTS for dtype in DTYPES]
CASES += [([LARGE], "mixed", torch.float32), ([LARGE], "mixed", torch.bfloat16), (CROWD, "guarded", torch.float32)]
CASES += [(CROWD, "guarded", "every"), (CROWD, "mixed", "every")]
CASE_IDS = [
    f"{f'list of {len(sizes)}' if len(sizes) > 1 else sizes[0]} {layout} {str(dtype).removeprefix('torch.')}"
    for sizes, layout, dtype in CASES
]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def lay(values: Tensor, layout: str) -> Tensor:
    """A copy in another layout; memory around and between its elements is NaN."""
    shape, size = values.shape, values.numel()
    if layout == "guarded":
        view = values.new_full((size + 16,), torch.nan)[5 : 5 + size].view(shape)
    elif layout == "transposed":
        view = values.new_empty(shape[::-1]).permute(*reversed(range(len(shape))))
    elif layout == "sliced":
        view = values.new_full((*shape[:-1], 2 * shape[-1]), torch.nan)[..., ::2]
    else:
        view = torch.empty_like(values, memory_format=torch.channels_last)
    return view.copy_(values)


def draw(sizes: list[int], layout: str, dtype: torch.dtype | str, which: int) -> list[Tensor]:
    """List number `which`, normally distributed; dtype "every" goes through all dtypes, place by place."""
    random = torch.Generator().manual_seed(which)
    drawn = []
    for place, size in enumerate(sizes):
        values = torch.randn(SHAPES[size], generator=random)
        kind = DTYPES[place % 4] if isinstance(dtype, str) else dtype
        drawn.append(lay(values.to(kind), LAYOUTS[(place + which) % 4] if layout == "mixed" else layout))
    return drawn


def poison(tensors: list[Tensor]) -> list[Tensor]:
    """NaN everywhere: what is written without being read shows that all of it was written."""
    return [tensor.fill_(torch.nan) for tensor in tensors]


def double(tensors: list[Tensor] | None) -> list[Tensor] | list[None]:
    return [None] * 10**4 if tensors is None else [tensor.to(torch.float64, copy=True) for tensor in tensors]


class Kept:
    """Remembers tensors that must not change."""

    def __init__(self, *lists: list[Tensor] | None) -> None:
        self.tensors = [tensor for each in lists for tensor in each or ()]
        self.before = [tensor.clone() for tensor in self.tensors]

    def check(self) -> None:
        for now, was in zip(self.tensors, self.before, strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def check_surroundings(tensors: list[Tensor]) -> None:
    """Nothing was written between the elements of a view or beside them."""
    for tensor in tensors:
        memory = tensor._base
        if memory is not None and memory.numel() > tensor.numel():
            assert int(memory.isnan().sum()) == memory.numel() - tensor.numel()


def within(found: list[Tensor], pairs: list[tuple[Tensor, Tensor]], roundings: int) -> None:
    """Every element is as near to the truth as arithmetic with so many roundings in a row must come.

    A rounding moves its result by half an epsilon at most, of float32, or of float64 where the data is: the sum of the
    absolute terms bounds the size of every intermediate result (the hundredth more is for errors of errors). A half
    type adds one rounding when the result is stored. Near zero, spacing is absolute: one subnormal step.
    """
    for got, (want, scale) in zip(found, pairs, strict=True):
        kind = torch.finfo(got.dtype)
        computed = min(kind.eps, torch.finfo(torch.float32).eps) / 2
        bound = 1.01 * roundings * computed * scale
        if kind.eps > torch.finfo(torch.float32).eps:
            bound = bound + kind.eps / 2 * (want.abs() + bound)
        error = (got.double() - want).abs()
        assert bool((error <= bound + kind.smallest_normal * kind.eps).all()), f"{float((error / bound).max())} bounds"
    check_surroundings(found)


def displace(theta, d, alpha):
    return theta - alpha * d, theta.abs() + alpha * d.abs()


def project(a, b, factor_a, factor_b):
    """(a + s·b, its size), (b + t·a, its size)."""
    sizes = a.abs() + abs(factor_a) * b.abs(), b.abs() + abs(factor_b) * a.abs()
    return (a + factor_a * b, sizes[0]), (b + factor_b * a, sizes[1])


def extrapolate(theta, theta0, memorised, alpha, eta):
    size = eta * ((1 + alpha) * theta0.abs() + alpha * memorised.abs())
    value = eta * (theta0 + alpha * (theta0 - memorised))
    return (value, size) if eta == 1 else (value + (1 - eta) * theta, size + (1 - eta) * theta.abs())


def saliency(grad, theta):
    value = grad.abs() if theta is None else grad.abs() * theta.abs()
    return value, value


def penalty(theta, theta0, fisher, l2, l1, prox):
    """(∇P, its size), (P, its size); P = ½·l2‖θ‖² + l1‖θ‖₁ + ½·prox·Σ F (θ − θ₀)²."""
    slope, slope_size = l2 * theta + l1 * theta.sign(), l2 * theta.abs() + l1
    value = size = (l2 / 2 * theta**2 + l1 * theta.abs()).sum()
    if theta0 is not None:
        weight = prox if fisher is None else prox * fisher
        away, away_size = theta - theta0, theta.abs() + theta0.abs()
        slope, slope_size = slope + weight * away, slope_size + weight * away_size
        value, size = value + (weight * away**2).sum() / 2, size + (weight * away_size**2).sum() / 2
    return (slope, slope_size), (value, size)


def update(theta, a, u, first, second, theta0, fisher, keep, *, scale, count, lr, beta1, beta2, eps, decay, l1, prox):
    """θ, m and (AdamW) v after a step along scale·(a + u) + penalties, each with its size."""
    (slope, slope_size), _ = penalty(theta, theta0, fisher, decay if second is None else 0.0, l1, prox)
    g = scale * (a if u is None else a + u) + slope
    size = scale * (a.abs() if u is None else a.abs() + u.abs()) + slope_size
    if second is None:
        m, m_size = beta1 * first + g, beta1 * first.abs() + size
        found = [(theta - lr * m, theta.abs() + lr * m_size), (m, m_size)]
    else:
        m, m_size = beta1 * first + (1 - beta1) * g, beta1 * first.abs() + (1 - beta1) * size
        v, v_size = beta2 * second + (1 - beta2) * g**2, beta2 * second + (1 - beta2) * size**2
        below = (v / (1 - beta2**count)).sqrt() + eps
        away, away_size = m / (1 - beta1**count) / below, m_size / (1 - beta1**count) / below
        # the root halves the relative error of v; it is counted in `roundings` as one in v_size / v
        moved = theta - lr * decay * theta - lr * away
        found = [(moved, theta.abs() * (1 + lr * decay) + lr * away_size * (1 + v_size / v)), (m, m_size), (v, v_size)]
    if keep is None:
        return found
    return [
        (torch.where(keep, new, old), size) for (new, size), old in zip(found, (theta, first, second), strict=False)
    ]
