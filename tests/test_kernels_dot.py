"""grad_dot: three sums in one read, per tensor and in total, the same bits every time."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, DTYPES, LARGE, SIZES, UNEVEN, clones, draw, kernels, modules, same

from fastlur import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def truth(a, b):
    """The three sums per tensor and the sums of their absolute terms; torch's own dot is less exact than the kernel."""
    rows, scales = [], []
    for x, y in zip(a, b, strict=True):
        x, y = (each.double().cpu().numpy().astype(np.longdouble) for each in (x, y))
        rows.append([float((x * y).sum()), float((x * x).sum()), float((y * y).sum())])
        scales.append([float(np.abs(x * y).sum()), *rows[-1][1:]])
    return (torch.tensor(each, dtype=torch.float64).view(-1, 3) for each in (rows, scales))


def check(a, b, steps=26):
    """A term's own rounding, sixteen to twenty-four additions in a block (numpy's, in the interpreter), a few more.

    The bound holds for blocks read once; each further block of a program is one more step.
    """
    total, each = kernels.grad_dot(a, b)
    assert total.dtype == each.dtype == torch.float64 and total.shape == (3,) and each.shape == (len(a), 3)
    want, scale = truth(a, b)
    eps = torch.tensor([torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps / 2 for x in a])
    bound = steps * eps.double().view(-1, 1) * scale
    assert bool(((each.cpu() - want).abs() <= bound).all())
    assert bool(((total.cpu() - want.sum(0)).abs() <= bound.sum(0) + 1e-15 * scale.sum(0)).all())
    return total, each


@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_one_tensor(size, contiguous, dtype):
    a, b = draw([size], dtype, 0, contiguous), draw([size], dtype, 1, contiguous)
    before = clones(a), clones(b)
    total, each = check(a, b)
    assert same([total], [each[0]])
    assert same(a, before[0]) and same(b, before[1])


@dtypes
def test_a_list(dtype):
    check(draw(UNEVEN, dtype, 0), draw(UNEVEN, dtype, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_million_elements(dtype):
    check(draw([LARGE], dtype, 0), draw([LARGE], dtype, 1))


def test_it_returns_what_the_reference_returns():
    a, b = draw(UNEVEN, torch.float64, 0), draw(UNEVEN, torch.float64, 1)
    for mine, theirs in zip(kernels.grad_dot(a, b), reference.grad_dot(a, b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_rows_keep_the_order_of_the_lists_when_dtypes_are_mixed():
    sizes = [5, 70, 0, 64, 1, 300, 129, 33]
    kinds = [DTYPES[i] for i in (0, 1, 1, 2, 3, 0, 1, 3)]
    check(draw(sizes, kinds, 0), draw(sizes, kinds, 1))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 47, 48, 49, 95, 96, 97, 16 * 7 + 5])
def test_programs_go_round_the_blocks(size, monkeypatch):
    """Few programs of small blocks: every block is counted once, wherever the end falls."""
    monkeypatch.setattr(modules["dot"], "BLOCK", 16)
    monkeypatch.setattr(modules["dot"], "PARTIALS", 3)
    a, b = draw([size], seed=0), draw([size], seed=1)
    check(a, b, steps=26 + size // 48)
    ones = [torch.ones(n, device=DEVICE) for n in (size, 0, 31, size + 1)]
    total, each = kernels.grad_dot(ones, [2 * x for x in ones])
    assert each.tolist() == [[2.0 * n, 1.0 * n, 4.0 * n] for n in (size, 0, 31, size + 1)]
    assert total.tolist() == each.sum(0).tolist()


def test_more_partial_sums_than_the_last_stage_adds_at_once(monkeypatch):
    monkeypatch.setattr(modules["dot"], "BLOCK", 16)
    monkeypatch.setattr(modules["reduction"], "ADDED", 8)
    ones = [torch.ones(n, device=DEVICE) for n in (16 * 8, 16 * 9, 16 * 23 + 1, 3)]
    total, each = kernels.grad_dot(ones, ones)
    assert each[:, 1].tolist() == [float(x.numel()) for x in ones]
    assert total.tolist() == [float(sum(x.numel() for x in ones))] * 3


def test_one_huge_tensor_among_many_tiny_ones():
    sizes = [3] * 30 + [60_000] + [1] * 30
    check(draw(sizes, seed=0), draw(sizes, seed=1))


def test_empty_lists():
    total, each = kernels.grad_dot([], [])
    assert total.tolist() == [0.0] * 3 and each.shape == (0, 3) and total.dtype == each.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_totals(bad):
    a, b = draw([63, 1025], seed=0), draw([63, 1025], seed=1)
    a[1][-1] = bad
    total, each = kernels.grad_dot(a, b)
    assert not bool(total[:2].isfinite().any()) and bool(total[2].isfinite())
    assert bool(each[0].isfinite().all()) and not bool(each[1, :2].isfinite().any())


def test_a_thousand_repetitions_give_one_bit_pattern(monkeypatch):
    monkeypatch.setattr(modules["dot"], "BLOCK", 64)
    a, b = draw([65], seed=0), draw([65], seed=1)
    first = kernels.grad_dot(a, b)
    for _ in range(1000):
        assert same(kernels.grad_dot(a, b), first)
