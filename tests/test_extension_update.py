"""The compiled extension's fused update against float64 truth."""

import pytest
import torch
from extension_cases import Lists, a_few, assert_close, control, double, everywhere, hyper

from fastlur import _extension as extension
from fastlur import reference

pytestmark = pytest.mark.usefixtures("compiled")


def step_scales(theta, m1, m2, a, u, theta0, fisher, c, h):
    """For each output the sum of the terms that enter it, all positive: what rounding errors are relative to."""
    scales = [], [], []
    for i, weight in enumerate(theta):
        g = (a[i].abs() + (0 if u is None else u[i].abs())) * c[reference.SCALE]
        g = g + weight.abs() * h[reference.WEIGHT_DECAY] + h[reference.L1]
        if theta0 is not None:
            g = g + (weight.abs() + theta0[i].abs()) * (1 if fisher is None else fisher[i]) * h[reference.PROX]
        first = m1[i].abs() + g
        scales[1].append(first)
        if m2 is None:
            scales[0].append(weight.abs() + h[reference.LR] * first)
            continue
        fresh = g.square() * (1 - h[reference.BETA2])
        second = m2[i] * h[reference.BETA2]
        scales[2].append(second + fresh)
        one, two = (1 - h[k] ** c[reference.COUNT] for k in (reference.MOMENTUM, reference.BETA2))
        away = first / one / (second / two).sqrt() * (1 + fresh / second)
        scales[0].append(weight.abs() * (1 + h[reference.LR] * h[reference.WEIGHT_DECAY]) + h[reference.LR] * away)
    return scales


def run_update(shapes, dtype, contiguous, h, c, adam=False, both=True, terms="none", masked=False):
    """One step by the extension, held against the truth; returns what is written, after and before, and the mask."""
    lists = Lists(shapes, dtype, contiguous)
    theta, m1 = lists.new(written=True), lists.new(written=True)
    m2 = lists.new(written=True, positive=True) if adam else None
    a, u = lists.new(), lists.new() if both else None
    theta0 = None if terms == "none" else lists.new()
    fisher = lists.new(positive=True) if terms == "fisher" else None
    mask = [torch.rand(x.shape, generator=lists.random) < 0.5 for x in theta] if masked else None
    written = [theta, m1, *([m2] if adam else [])]
    before = [[x.clone() for x in each] for each in written]
    truth = [double(each) for each in (theta, m1, m2)]
    rest = [double(each) for each in (theta0, fisher)]
    scales = step_scales(*truth, double(a), double(u), *rest, c, h)
    reference.meta_update(truth[0], double(a), double(u), truth[1], truth[2], *rest, mask, c, h)
    extension.meta_update(theta, a, u, m1, m2, theta0, fisher, mask, c, h)
    if c[reference.OK] > 0:
        for each, expected, scale in zip(written, truth, scales, strict=False):
            assert_close(each, expected, scale, 24)
    after = [[x.clone() for x in each] for each in written]
    lists.check()
    return after, before, mask


@everywhere
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
def test_meta_update(shapes, dtype, contiguous, adam):
    run_update(shapes, dtype, contiguous, hyper(decay=0.5), control(), adam)


@a_few
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize("lr", [10.0, 1e-6])
@pytest.mark.parametrize(
    ("both", "terms", "masked"), [(False, "none", True), (True, "prox", False), (True, "fisher", True)]
)
def test_meta_update_with_every_operand(shapes, dtype, contiguous, adam, lr, both, terms, masked):
    h = hyper(lr=lr, decay=0.5, l1=0.1, prox=0.3)
    after, before, mask = run_update(shapes, dtype, contiguous, h, control(), adam, both, terms, masked)
    for now, then in zip(after, before, strict=True):
        for i, (x, y) in enumerate(zip(now, then, strict=True)):
            if masked:
                assert torch.equal(x[~mask[i]], y[~mask[i]])
    assert not all(torch.equal(x, y) for x, y in zip(after[1], before[1], strict=True))


def test_a_small_step_is_not_lost_in_the_tolerance():
    """At lr = 1e-6 the weights hardly move: here the move itself is compared."""
    theta, a = torch.randn(5000, dtype=torch.float64), torch.randn(5000, dtype=torch.float64)
    before, moment = theta.clone(), torch.zeros_like(theta)
    extension.meta_update([theta], [a], None, [moment], None, None, None, None, control(scale=0.5), hyper(lr=1e-6))
    torch.testing.assert_close(before - theta, 5e-7 * a, rtol=1e-6, atol=1e-15)
    assert torch.equal(moment, 0.5 * a)


@a_few
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
def test_nothing_is_written_when_the_flag_is_down(shapes, dtype, contiguous, adam):
    after, before, _ = run_update(shapes, dtype, contiguous, hyper(lr=torch.nan), control(ok=0.0), adam)
    for now, then in zip(after, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(now, then, strict=True))
