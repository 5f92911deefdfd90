"""grad_dot, regularize, threshold and step_control by the plain-torch backend, against float64 written out."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
import truth
from truth import CASE_IDS, CASES, CROWD, DTYPES, LARGE, SHAPES, Kept, check_surroundings, double, draw, lay, within

from fastlur import backends, ops, reference
from fastlur.operands import hyper_parameters

everywhere = pytest.mark.parametrize(("sizes", "layout", "dtype"), CASES, ids=CASE_IDS)
FINE = 2.0**-53  # a rounding error of float64


@pytest.fixture(autouse=True)
def _plain():
    with backends.backend("torch"):
        yield


def rounding(tensor):
    return FINE if tensor.dtype == torch.float64 else 2.0**-24


@everywhere
def test_grad_dot(sizes, layout, dtype):
    """n additions in a row, each wrong by a rounding of a part of the sum, miss by about √n roundings of the whole."""
    a, b = (draw(sizes, layout, dtype, which) for which in range(2))
    kept = Kept(a, b)
    total, each = ops.grad_dot(a, b)
    assert total.dtype == each.dtype == torch.float64
    assert total.shape == (3,) and each.shape == (len(sizes), 3)
    expected, bounds = torch.zeros(len(sizes), 3).double(), torch.zeros(len(sizes), 3).double()
    for place, (x, y) in enumerate(zip(double(a), double(b), strict=True)):
        terms = [x * y, x * x, y * y]
        expected[place] = torch.stack([term.sum() for term in terms])
        # one in each product, √n in the float32 sum of a piece, 64 in the rest
        wrong = (1 + math.sqrt(min(x.numel(), reference.PIECE))) * rounding(a[place]) + 64 * FINE
        bounds[place] = wrong * torch.stack([term.abs().sum() for term in terms])
    assert bool(((each - expected).abs() <= bounds).all())
    assert bool(((total - expected.sum(0)).abs() <= bounds.sum(0)).all())
    kept.check()


@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.view(1024, -1).t(), lambda x: x.view(-1, 2)[:, 0]])
def test_a_long_sum_keeps_six_digits(lay):
    """However large a piece is: of numbers that are all positive, so that every rounding counts."""
    x, y = (lay(torch.rand(2**22)) for _ in range(2))
    found = ops.grad_dot(x, y)[0]
    truth = torch.stack([(x.double() * y.double()).sum(), x.double().square().sum(), y.double().square().sum()])
    assert bool(((found - truth).abs() <= 1e-7 * truth).all())


def whole(sizes, layout, dtype, which, low=-3, high=4):
    """Small whole numbers, whose products and sums are exact in every dtype computed with."""
    random = torch.Generator().manual_seed(which)
    return [lay(torch.randint(low, high, SHAPES[size], generator=random).to(dtype), layout) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[0], [1], [1023], [LARGE], CROWD], ids=lambda sizes: f"{len(sizes)} of {sizes[0]}")
@pytest.mark.parametrize("layout", ["guarded", "transposed"])
def test_no_element_is_lost_or_counted_twice(sizes, layout, dtype):
    a, b = (whole(sizes, layout, dtype, which) for which in range(2))
    expected = [
        [int((x * y).sum()) for x, y in ((p, q), (p, p), (q, q))] for p, q in zip(double(a), double(b), strict=True)
    ]
    total, each = ops.grad_dot(a, b)
    assert each.tolist() == expected
    assert total.tolist() == torch.tensor(expected).sum(0).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[0], [1], [1023], [LARGE], CROWD], ids=lambda sizes: f"{len(sizes)} of {sizes[0]}")
@pytest.mark.parametrize("layout", ["guarded", "transposed"])
def test_the_value_of_a_penalty_of_whole_numbers_is_exact(sizes, layout, dtype):
    theta, theta0 = (whole(sizes, layout, dtype, which) for which in range(2))
    fisher = whole(sizes, layout, dtype, 2, low=0)
    grad = [torch.zeros_like(x) for x in theta]
    places = zip(double(theta), double(theta0), double(fisher), strict=True)
    values = [truth.penalty(*place, l2=0.5, l1=2.0, prox=0.25)[1][0] for place in places]
    value = ops.regularize(grad, theta, theta0, fisher, l2=0.5, l1=2.0, prox=0.25)
    assert float(value) == sum(map(float, values))


def test_sums_are_kept_in_float64():
    """Totals that float32 cannot tell from their neighbours: of pieces, and inside one."""
    many, one = torch.full((3 * reference.PIECE,), 16.0), torch.ones(1)
    total, _ = ops.grad_dot([torch.cat((many, one))], [torch.cat((many, one))])
    assert total.tolist() == [3 * reference.PIECE * 256 + 1] * 3
    theta = torch.full((reference.PIECE,), 64.0)
    theta[7] = 1.0
    value, zero = (reference.PIECE - 1) * 4096 + 1, torch.zeros_like(theta)
    assert float(ops.regularize(torch.zeros_like(theta), theta, l2=2.0)) == value
    assert float(ops.regularize(torch.zeros_like(theta), theta, zero, prox=2.0)) == value
    theta = theta.square()
    assert float(ops.regularize(torch.zeros_like(theta), theta, l1=1.0)) == value


FORMS = {
    "l2": ({"l2": 0.5}, 0),
    "l1": ({"l1": 0.25}, 0),
    "both, and no centre": ({"l2": 0.5, "l1": 0.25, "prox": 0.75}, 0),
    "prox": ({"prox": 0.75}, 1),
    "fisher": ({"prox": 0.75}, 2),
    "all": ({"l2": 0.5, "l1": 0.25, "prox": 0.75}, 2),
}


def check_regularize(sizes, layout, dtype, form):
    factors, extras = FORMS[form]
    grad, theta, theta0, fisher = (draw(sizes, layout, dtype, which) for which in range(4))
    fisher = [f.abs_() for f in fisher] if extras > 1 else None
    theta0 = theta0 if extras else None
    kept = Kept(theta, theta0, fisher)
    given = {"l2": 0.0, "l1": 0.0, "prox": 0.0} | factors
    places = zip(double(theta), double(theta0), double(fisher), strict=False)
    slopes, values = zip(*(truth.penalty(*place, **given) for place in places), strict=True)
    pairs = [(g + slope, g.abs() + size) for g, (slope, size) in zip(double(grad), slopes, strict=True)]
    value = ops.regularize(grad, theta, theta0, fisher, **factors)
    # θ − θ₀, the factor and its product, F, a sum, and the sum with what was there
    within(grad, pairs, 6)
    # four in each term: the difference twice, its square, F; and as many as 64 on the way through the sum in float64
    bound = sum((4 * rounding(t) + 64 * FINE) * float(size) for t, (_, size) in zip(theta, values, strict=True))
    assert value.shape == () and value.dtype == torch.float64
    assert abs(float(value) - sum(float(want) for want, _ in values)) <= bound
    kept.check()


@everywhere
def test_regularize(sizes, layout, dtype):
    check_regularize(sizes, layout, dtype, "all")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["guarded", "mixed"])
@pytest.mark.parametrize("form", FORMS)
def test_regularize_with_some_of_the_terms(form, layout, dtype):
    check_regularize([63, 0, 1025], layout, dtype, form)


def test_a_gradient_at_zero_has_no_sign():
    grad, theta = torch.ones(3), torch.tensor([0.0, -0.0, 2.0])
    assert float(ops.regularize(grad, theta, l1=0.5)) == 1.0
    assert grad.tolist() == [1.0, 1.0, 1.5]


@pytest.mark.parametrize("layout", ["guarded", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[1], [1023, 0, 1025], CROWD, [LARGE]], ids=lambda s: f"{len(s)} of {s[0]}")
def test_threshold_is_a_place_in_the_sorted_scores(sizes, dtype, layout):
    scores = draw(sizes, layout, dtype, 0)
    kept = Kept(scores)
    ordered = torch.cat([x.reshape(-1) for x in double(scores)]).sort().values
    for sparsity in (0, 0.07, 0.29, 1 - 1e-9, 1) if sizes != [LARGE] else (0.29, 1 - 1e-9):
        place = max(1, math.floor(Fraction(str(sparsity)) * len(ordered)))
        found = ops.threshold(scores, sparsity)
        assert found.dtype == torch.float64 and found.shape == ()
        assert float(found) == float(ordered[place - 1])
    kept.check()
    check_surroundings(scores)


LOSSES = ([0.5, 2.0], [], [[1.0], [-3.0]], [math.inf, 0.0], [math.nan], [1.0, -math.inf])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dots",
    [
        *[(0.0, 9.0, 16.0), (2.0, 1.0, 4.0), (-1.0, 1.0, 1.0), (-1.1, 1.0, 1.0), (0.0, 0.0, 0.0)],
        *[(math.nan, 1.0, 1.0), (0.0, math.inf, 1.0), (0.0, 1.0, -math.inf)],
    ],
)
def test_step_control(dots, dtype):
    for losses, clip, ok in itertools.product(LOSSES, (0.0, 1e-6, 1.5, 5.0, 1e3), (1.0, 0.0)):
        hyper = hyper_parameters("cpu", clip=clip, lr=3.0, prox=7.0)
        given = [torch.tensor(dots, dtype=torch.float64), torch.tensor(losses, dtype=dtype), hyper]
        kept = Kept(given)
        fine = all(map(math.isfinite, (*dots, *given[1].flatten().tolist())))
        control = torch.tensor([ok, 4.0, math.nan], dtype=torch.float64)
        ops.step_control(control, *given)
        assert control[:2].tolist() == [ok * fine, 4.0 + ok * fine]
        if fine:
            norm = math.sqrt(max(0.0, dots[1] + 2 * dots[0] + dots[2]))
            # four roundings (two sums, a root, a quotient), and the root halves what came before
            assert float(control[2]) == pytest.approx(clip / norm if 0 < clip < norm else 1.0, rel=4 * FINE, abs=0)
        kept.check()


@pytest.mark.parametrize("call", [ops.step_control, torch.ops.fastlur.step_control])
def test_losses_that_are_finite_but_overflow_their_dtype_when_added_are_finite(call):
    control, hyper = torch.ones(3, dtype=torch.float64), hyper_parameters("cpu")
    call(control, torch.ones(3).double(), torch.full((2,), 40000.0, dtype=torch.float16), hyper)
    assert control[:2].tolist() == [1, 2]


def test_the_flag_stays_down():
    control, hyper = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), hyper_parameters("cpu")
    for loss in (1.0, math.nan, 1.0):
        ops.step_control(control, torch.ones(3).double(), torch.tensor(loss), hyper)
    assert control[:2].tolist() == [0, 1]
