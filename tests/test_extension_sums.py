"""The compiled extension's sums against float64 truth: dots, penalties, and the step's decision."""

import pytest
import torch
from extension_cases import DTYPES, Lists, a_few, assert_close, control, double, everywhere, hyper, numbers

from fastlur import _extension as extension
from fastlur import reference

pytestmark = pytest.mark.usefixtures("compiled")


@everywhere
def test_grad_dot(shapes, dtype, contiguous):
    lists = Lists(shapes, dtype, contiguous)
    a, b = lists.new(), lists.new()
    total, each = extension.grad_dot(a, b)
    truth_total, truth_each = reference.grad_dot(double(a), double(b))
    scale = reference.grad_dot([x.double().abs() for x in a], [x.double().abs() for x in b])
    eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    # 256 products are added up in the type computed with; the errors of float64 after that are as many again at most
    assert ((total - truth_total).abs() <= 256 * eps * scale[0] + 1e-300).all()
    assert ((each - truth_each).abs() <= 256 * eps * scale[1] + 1e-300).all()
    assert total.dtype == each.dtype == torch.float64 and each.shape == (len(a), 3)
    lists.check()


def test_float64_takes_over_before_float32_runs_out_of_digits():
    """Of whole numbers, one of them odd: a float32 sum of a whole block would lose it."""
    x = torch.full((2**15,), 64.0)
    x[7] = 1.0
    exact = (2**15 - 1) * 4096 + 1
    assert extension.grad_dot([x], [x])[0].tolist() == [exact] * 3
    assert float(extension.regularize([torch.zeros_like(x)], [x], None, None, hyper(decay=2.0))) == exact


def test_a_dot_does_not_depend_on_the_tensors_beside_it():
    a, b = torch.randn(100_003), torch.randn(100_003)
    others = [torch.randn(k) for k in (1, 70_000, 33)]
    alone = extension.grad_dot([a], [b])[1][0]
    assert torch.equal(extension.grad_dot([*others, a], [*others, b])[1][3], alone)


def test_grad_dot_has_one_bit_pattern():
    a, b = torch.randn(100_003), torch.randn(100_003)
    lists = [a, a[:17], a[5:]], [b, b[:17], b[5:]]
    threads = torch.get_num_threads()
    try:
        patterns = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            patterns |= {
                tuple(part.numpy().tobytes() for part in extension.grad_dot(*lists))
                for _ in range(1000 if count == 2 else 20)
            }
            value = extension.regularize([a.clone()], [b], None, None, hyper(decay=0.5, l1=0.1))
            patterns.add(value.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(patterns) == 2  # one of the dots, one of the penalty's value


@pytest.mark.parametrize("loss", [[0.5, 2.0], [torch.inf, 0.0], [torch.nan], []])
@pytest.mark.parametrize("dots", [(1.0, 2.0, 3.0), (-1.0, 1.0, 1.0), (-1.1, 1.0, 1.0), (torch.nan, 1.0, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_control(loss, dots, dtype):
    losses = torch.tensor(loss, dtype=dtype)
    for clip in (0.0, 1.5, 100.0):
        for ok in (0.0, 1.0):
            actual, truth = control(ok), control(ok)
            extension.step_control(actual, numbers(*dots), losses, hyper(clip=clip))
            reference.step_control(truth, numbers(*dots), losses, hyper(clip=clip))
            torch.testing.assert_close(actual, truth, rtol=1e-15, atol=0, equal_nan=True)


@everywhere
def test_regularize(shapes, dtype, contiguous):
    check_regularize(shapes, dtype, contiguous, "fisher")


@a_few
@pytest.mark.parametrize("terms", ["norms", "proximal"])
def test_regularize_with_fewer_terms(shapes, dtype, contiguous, terms):
    check_regularize(shapes, dtype, contiguous, terms)


def check_regularize(shapes, dtype, contiguous, terms):
    lists = Lists(shapes, dtype, contiguous)
    grad, theta = lists.new(written=True), lists.new()
    theta0 = None if terms == "norms" else lists.new()
    fisher = lists.new(positive=True) if terms == "fisher" else None
    h = hyper(decay=0.5, l1=0.1, prox=0.3)
    truth = double(grad)
    truth_value = reference.regularize(truth, double(theta), double(theta0), double(fisher), h)
    scale = [1.0 + g.double().abs() + t.double().abs() for g, t in zip(grad, theta, strict=True)]
    if theta0 is not None:
        one = [torch.ones_like(t, dtype=torch.float64) for t in theta] if fisher is None else double(fisher)
        scale = [s + f * t.double().abs() + f * s for s, f, t in zip(scale, one, theta0, strict=True)]
    value = extension.regularize(grad, theta, theta0, fisher, h)
    assert_close(grad, truth, scale, 8)
    eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    assert value.shape == () and (value - truth_value).abs() <= 256 * eps * truth_value
    lists.check()
