"""displace, project, extrapolate and saliency by the plain-torch backend, against float64 written out in truth.py."""

from __future__ import annotations

import pytest
import torch
import truth
from truth import CASE_IDS, CASES, DTYPES, LARGE, Kept, double, draw, number, poison, within

from fastlur import backends, ops, reference

KINDS = ("one_sided", "symmetric", "scissorhands")
everywhere = pytest.mark.parametrize(("sizes", "layout", "dtype"), CASES, ids=CASE_IDS)


@pytest.fixture(autouse=True)
def _plain():
    with backends.backend("torch"):
        yield


def lists(count, sizes, layout, dtype):
    return [draw(sizes, layout, dtype, which) for which in range(count)]


def at_each_place(oracle, *operands, **numbers):
    return [oracle(*place, **numbers) for place in zip(*operands, strict=False)]


@everywhere
@pytest.mark.parametrize("alpha", [10.0, 1e-6])
def test_displace(sizes, layout, dtype, alpha):
    out, theta, d = lists(3, sizes, layout, dtype)
    kept, wide = Kept(theta, d), [double(theta), double(d)]
    ops.displace(poison(out), theta, d, alpha)
    # α is rounded, the product and the difference are
    within(out, at_each_place(truth.displace, *wide, alpha=alpha), 3)
    if sizes != [LARGE]:
        norm2 = 4 + sum(float(x.square().sum()) for x in wide[1])
        ops.displace(poison(out), theta, d, alpha, number(norm2))
        # the root, its reciprocal and its product with α come to that, in float64
        within(out, at_each_place(truth.displace, *wide, alpha=alpha / norm2**0.5), 6)
    kept.check()


@pytest.mark.parametrize("which", [0, 1], ids=["the point", "the vector"])
def test_displace_may_write_over_what_it_reads(which):
    operands = lists(2, [63, 1025, 2**17], "guarded", torch.float32)
    expected = at_each_place(truth.displace, *(double(each) for each in operands), alpha=0.5)
    ops.displace(operands[which], *operands, 0.5)
    within(operands[which], expected, 3)


def test_displace_moves_nothing_by_a_vector_without_length_or_with_none_that_is_known():
    theta, d = lists(2, [63], "guarded", torch.float32)
    for norm2 in (0.0, -1.0, torch.nan):
        out = [torch.full_like(theta[0], torch.nan)]
        ops.displace(out, theta, d, 0.1, number(norm2))
        assert torch.equal(out[0], theta[0])


def factors(kind, ab, aa, bb):
    """What the three rules say, s for a and t for b."""
    if ab >= 0:
        return 0.0, 0.0
    if kind == "scissorhands":
        return 0.0, max(0.5, -ab / (aa + 1e-3))
    return (-ab / bb if kind == "symmetric" and bb > 0 else 0.0), (-ab / aa if aa > 0 else 0.0)


def check_project(sizes, layout, dtype, kind, numbers):
    a, b = lists(2, sizes, layout, dtype)
    s, t = factors(kind, *numbers)
    kept = Kept(a if s == 0 else None, b if t == 0 else None)
    pairs = at_each_place(truth.project, double(a), double(b), factor_a=s, factor_b=t)
    ops.project(a, b, torch.tensor(numbers, dtype=torch.float64), kind)
    # the factor (a sum, a quotient, itself rounded to the data's precision), the product and the sum
    within(a, [pair[0] for pair in pairs], 5)
    within(b, [pair[1] for pair in pairs], 5)
    kept.check()


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_project(sizes, layout, dtype, kind):
    check_project(sizes, layout, dtype, kind, (-3.0, 2.0, 7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "numbers",
    [(3.0, 2.0, 7.0), (0.0, 2.0, 7.0), (-1.0, 4.0, 9.0), (-1e-3, 1e-3, 2.0), (-1.0, 0.0, 0.0), (-9.0, 1.0, 0.0)],
    ids=["agreement", "a right angle", "a weak conflict", "a small memory", "nothing to divide by", "no b"],
)
def test_project_by_every_branch_of_the_rules(numbers, kind, dtype):
    if kind == "one_sided" or numbers[1:] != (0.0, 0.0):
        check_project([63, 1025], "mixed", dtype, kind, numbers)
    a, b = torch.randn(2, 5)
    ops.project(a, b, torch.tensor(numbers, dtype=torch.float64), kind)
    assert bool(a.isfinite().all() & b.isfinite().all())


@everywhere
@pytest.mark.parametrize(("alpha", "eta"), [(10.0, 1.0), (1e-6, 0.25)])
def test_extrapolate(sizes, layout, dtype, alpha, eta):
    theta, theta0, memorised = lists(3, sizes, layout, dtype)
    kept = Kept(theta0, memorised)
    wide = [double(each) for each in (theta, theta0, memorised)]
    pairs = at_each_place(truth.extrapolate, *wide, alpha=alpha, eta=eta)
    ops.extrapolate(poison(theta) if eta == 1 else theta, theta0, memorised, alpha, eta)
    # 1 + α (twice: in float64 and in the data's precision), its product, a difference, η and its product, a sum
    within(theta, pairs, 7)
    kept.check()


@everywhere
@pytest.mark.parametrize("weighted", [True, False])
def test_saliency(sizes, layout, dtype, weighted):
    out, grad, theta = lists(3, sizes, layout, dtype)
    kept = Kept(grad, theta)
    ops.saliency(poison(out), grad, theta if weighted else None)
    within(out, at_each_place(truth.saliency, double(grad), double(theta if weighted else None)), 1)
    kept.check()
    assert all(bool((x >= 0).all()) for x in out)


@pytest.mark.parametrize("piece", [1, 63, 64, 65, 128])
def test_where_pieces_end_makes_no_difference(piece, monkeypatch):
    """Elementwise operations give the same bits however they are cut."""

    def results():
        a, b, c = lists(3, [63, 1, 0, 1025], "guarded", torch.float32)
        ops.displace(a, b, c, 0.3)
        ops.project(b, c, torch.tensor([-3.0, 2.0, 7.0], dtype=torch.float64), "symmetric")
        ops.extrapolate(c, a, b, 0.3, 0.5)
        ops.saliency(a, b, c)
        return [*a, *b, *c]

    whole = results()
    monkeypatch.setattr(reference, "PIECE", piece)
    assert all(torch.equal(x, y) for x, y in zip(results(), whole, strict=True))
