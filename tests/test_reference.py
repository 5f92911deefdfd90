"""The plain-torch backend on small examples; test_reference_*.py have all sizes, layouts and dtypes, in float64."""

from __future__ import annotations

import pytest
import torch

from fastlur import backends, ops, reference


class TestTruth:
    """What the operations are for, seen on one small vector each."""

    @pytest.fixture(autouse=True)
    def _plain(self):
        with backends.backend("torch"):
            yield

    @pytest.mark.parametrize("conflict", [True, False])
    def test_project(self, conflict):
        a, b = torch.randn(2, 40, dtype=torch.float64)
        b = b - (b @ a + (1.0 if conflict else -1.0)) / (a @ a) * a
        dots = ops.grad_dot(a, b)[0]
        assert (float(dots[0]) < 0) == conflict
        one = a.clone(), b.clone()
        ops.project(*one, dots, "one_sided")
        both = a.clone(), b.clone()
        ops.project(*both, dots, "symmetric")
        scissors = a.clone(), b.clone()
        ops.project(*scissors, dots, "scissorhands")
        assert all(torch.equal(kept, a) for kept in (one[0], scissors[0]))
        if not conflict:
            assert all(torch.equal(x, y) for pair in (one, both, scissors) for x, y in zip(pair, (a, b), strict=True))
            return
        assert float(a @ one[1]) == pytest.approx(0, abs=1e-12)
        assert float(b @ both[0]) == pytest.approx(0, abs=1e-12)
        assert float(a @ both[1]) == pytest.approx(0, abs=1e-12)
        v = max(0.5, float(-(a @ b) / (a @ a + 1e-3)))
        torch.testing.assert_close(scissors[1], b + v * a)

    def test_without_conflict_not_even_infinities_spread(self):
        a, b = torch.tensor([float("inf"), 1.0]), torch.tensor([1.0, 2.0])
        for kind in reference.PROJECTIONS:
            x, y = a.clone(), b.clone()
            ops.project(x, y, torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64), kind)
            assert torch.equal(x, a)
            assert torch.equal(y, b)

    def test_projection_of_vanishing_vectors_is_finite(self):
        for kind in reference.PROJECTIONS:
            x, y = torch.zeros(4), torch.zeros(4)
            ops.project(x, y, torch.tensor([-1e-30, 0.0, 0.0], dtype=torch.float64), kind)
            assert bool(torch.isfinite(x).all() & torch.isfinite(y).all())

    def test_regularize_is_the_gradient_of_its_value(self):
        theta, theta0 = torch.randn(2, 30, dtype=torch.float64)
        fisher = torch.rand(30, dtype=torch.float64)
        for parts in ({}, {"theta0": theta0}, {"theta0": theta0, "fisher": fisher}):
            x = theta.clone().requires_grad_()
            value = 0.5 * 0.3 * x.square().sum() + 0.2 * x.abs().sum()
            if parts:
                value = value + 0.5 * 0.7 * (parts.get("fisher", 1.0) * (x - theta0).square()).sum()
            (expected,) = torch.autograd.grad(value, x)
            grad = torch.ones(30, dtype=torch.float64)
            found = ops.regularize(grad, theta, **parts, l2=0.3, l1=0.2, prox=0.7)
            assert float(found) == pytest.approx(float(value.detach()), rel=1e-12)
            torch.testing.assert_close(grad, 1 + expected)

    def test_extrapolate(self):
        theta, theta0, memorised = torch.randn(3, 9, dtype=torch.float64)
        start = theta.clone()
        ops.extrapolate(theta, theta0, memorised, 4.0, 0.675)
        torch.testing.assert_close(theta, 0.675 * (5 * theta0 - 4 * memorised) + 0.325 * start)
        unread = torch.full_like(theta, torch.nan)
        ops.extrapolate(unread, theta0, memorised, 4.0)
        torch.testing.assert_close(unread, 5 * theta0 - 4 * memorised)
        ops.extrapolate(unread, theta0, theta0, 4.0)  # having memorised nothing leads nowhere
        torch.testing.assert_close(unread, theta0)

    def test_saliency_and_threshold(self):
        grad, theta = torch.randn(2, 50)
        out = torch.full((50,), torch.nan)
        ops.saliency(out, grad, theta)
        assert torch.equal(out, (grad * theta).abs())
        ops.saliency(out, grad)
        assert torch.equal(out, grad.abs())
        scores = [torch.tensor([5.0, 1.0]), torch.tensor([[4.0], [2.0], [3.0]])]
        assert [float(ops.threshold(scores, s)) for s in (0, 0.4, 0.6, 1)] == [1, 2, 3, 5]
        assert float(ops.threshold(torch.arange(1.0, 101.0), 0.29)) == 29
