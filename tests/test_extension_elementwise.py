"""The compiled extension's elementwise operations against float64 truth."""

import pytest
import torch
from extension_cases import Lists, a_few, assert_close, double, everywhere, magnitudes, numbers

from fastlur import _extension as extension
from fastlur import reference

pytestmark = pytest.mark.usefixtures("compiled")


@everywhere
def test_displace(shapes, dtype, contiguous):
    lists = Lists(shapes, dtype, contiguous)
    out, theta, d = lists.new(written=True, poisoned=True), lists.new(), lists.new()
    for norm2 in (None, numbers(3.0)):
        truth = [torch.empty_like(x, dtype=torch.float64) for x in out]
        reference.displace(truth, double(theta), double(d), numbers(10.0), norm2)
        extension.displace(out, theta, d, numbers(10.0), norm2)
        assert_close(out, truth, magnitudes(double(theta), [10 * x for x in double(d)]), 3)
    lists.check()


PAST_THE_CACHE = {
    "displace": (lambda out, a, b: extension.displace([out], [a], [b], numbers(0.5)), lambda a, b: a - 0.5 * b),
    "extrapolate": (
        lambda out, a, b: extension.extrapolate([out], [a], [b], numbers(0.5), numbers(1.0)),
        lambda a, b: 1.5 * a - 0.5 * b,
    ),
    "saliency": (lambda out, a, b: extension.saliency([out], [a], [b]), lambda a, b: (a * b).abs()),
}


@pytest.mark.parametrize("name", PAST_THE_CACHE)
def test_past_the_cache_and_off_the_line(name):
    ours, truth = PAST_THE_CACHE[name]
    a, b = torch.randn(2**23 + 77), torch.randn(2**23 + 77)
    out = torch.full((2**23 + 80,), torch.nan)
    ours(out[1:-2], a, b)
    torch.testing.assert_close(out[1:-2], truth(a, b))
    assert out[[0, -2, -1]].isnan().all()


def test_displace_by_a_norm_of_zero_is_no_displacement():
    theta, out = torch.randn(100), torch.empty(100)
    extension.displace([out], [theta], [torch.randn(100)], numbers(1.0), numbers(0.0))
    assert torch.equal(out, theta)


def test_the_output_may_be_an_operand():
    theta, d = torch.randn(5000), torch.randn(5000)
    expected = theta - 0.5 * d
    extension.displace([theta], [theta], [d], numbers(0.5))
    torch.testing.assert_close(theta, expected)


KINDS = pytest.mark.parametrize("kind", ["one_sided", "symmetric", "scissorhands"])


@everywhere
@KINDS
def test_project(shapes, dtype, contiguous, kind):
    check_project(shapes, dtype, contiguous, kind, [numbers(-2.0, 4.0, 1.0)])


@a_few
@KINDS
def test_project_by_every_factor(shapes, dtype, contiguous, kind):
    no_conflict, zero, large = numbers(2.0, 4.0, 1.0), numbers(-1.0, 0.0, 0.0), numbers(-9.0, 4.0, 1.0)
    check_project(shapes, dtype, contiguous, kind, [no_conflict, zero, large])


def check_project(shapes, dtype, contiguous, kind, cases):
    for dots in cases:
        lists = Lists(shapes, dtype, contiguous)
        a, b = lists.new(written=kind == "symmetric"), lists.new(written=True)
        truth_a, truth_b = double(a), double(b)
        reference.project(truth_a, truth_b, dots, kind)
        s, t = (factor.abs() for factor in reference.projection(dots, kind))
        before = [x.clone() for x in b]
        scale_a = magnitudes(double(a), [x * s for x in double(b)])
        scale_b = magnitudes(double(b), [x * t for x in double(a)])
        extension.project(a, b, dots, kind)
        assert_close(a, truth_a, scale_a, 3)
        assert_close(b, truth_b, scale_b, 3)
        if dots[0] > 0:
            assert all(torch.equal(x, y) for x, y in zip(b, before, strict=True))
        lists.check()


@everywhere
@pytest.mark.parametrize("eta", [1.0, 0.25])
def test_extrapolate(shapes, dtype, contiguous, eta):
    lists = Lists(shapes, dtype, contiguous)
    theta = lists.new(written=True, poisoned=eta == 1.0)
    theta0, memorised = lists.new(), lists.new()
    truth = double(theta)
    reference.extrapolate(truth, double(theta0), double(memorised), numbers(10.0), numbers(eta))
    scale = magnitudes([11 * x for x in double(theta0)], [10 * x for x in double(memorised)])
    if eta != 1.0:
        scale = magnitudes(scale, double(theta))
    extension.extrapolate(theta, theta0, memorised, numbers(10.0), numbers(eta))
    assert_close(theta, truth, scale, 5)
    lists.check()


@everywhere
def test_saliency(shapes, dtype, contiguous):
    lists = Lists(shapes, dtype, contiguous)
    out, grad, weights = lists.new(written=True, poisoned=True), lists.new(), lists.new()
    for theta in (weights, None):
        truth = [torch.empty_like(x, dtype=torch.float64) for x in out]
        reference.saliency(truth, double(grad), double(theta))
        extension.saliency(out, grad, theta)
        assert_close(out, truth, truth, 1)
    lists.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_short_number_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    back, none = torch.empty_like(every), torch.zeros_like(every)
    extension.displace([back], [every], [none], numbers(0.0))
    # a NaN may change its bits, all else must not
    assert torch.equal(back.isnan(), every.isnan())
    assert torch.equal(back[~back.isnan()], every[~every.isnan()])
    # halves between neighbours, overflow and underflow: the products must be rounded as torch rounds them
    for factor in (1.5, 1 / 3, 1e-3, 3e4):
        x = every[every.isfinite()]
        extension.displace([out := torch.empty_like(x)], [torch.zeros_like(x)], [x], numbers(-factor))
        assert torch.equal(out, (x.float() * factor).to(dtype))
