"""The plain-torch backend, the truth for the others, against arithmetic written out in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import decided
from torch import Tensor

from fastlur import backends, ops, reference
from fastlur.operands import control_scalars, hyper_parameters

SIZES = (0, 1, 63, 1023, 1025, 2**20 + 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU = torch.device("cpu")


class TestTruth:
    """The plain-torch backend against arithmetic written out in float64."""

    @pytest.fixture(autouse=True)
    def _plain(self):
        with backends.backend("torch"):
            yield

    def close(self, found: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 8.0) -> None:
        """Within a few roundings of the dtype (float32 is the finest that half types compute in)."""
        eps = torch.finfo(dtype).eps
        tolerance = eps * scale if dtype != torch.float64 else 1e-13
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", SIZES)
    def test_grad_dot(self, size, dtype):
        a, b = torch.randn(2, size).to(dtype)
        total, each = ops.grad_dot([a, a[: size // 2]], [b, b[: size // 2]])
        x, y = a.double(), b.double()
        half = x[: size // 2], y[: size // 2]
        expected = torch.stack([torch.stack((p @ q, p @ p, q @ q)) for p, q in ((x, y), half)])
        scale = torch.stack([p.norm() * q.norm() for p, q in ((x, y), half)])[:, None] + 1e-30
        tolerance = 1e-5 if dtype != torch.float64 else 1e-12
        assert float(((each - expected).abs() / scale).max() if size else 0) <= tolerance
        torch.testing.assert_close(total, each.sum(0))
        assert total.dtype == each.dtype == torch.float64

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("alpha", [1e-6, 10.0])
    def test_displace(self, size, dtype, alpha):
        theta, d = torch.randn(2, size).to(dtype)
        out = torch.full_like(theta, torch.nan)
        kept = theta.clone(), d.clone()
        ops.displace(out, theta, d, alpha)
        self.close(out, theta.double() - alpha * d.double(), dtype)
        norm2 = ops.grad_dot(d, d)[0][0]
        ops.displace(out, theta, d, alpha, norm2)
        norm = d.double().norm()
        self.close(out, theta.double() - (alpha / norm if size else 0) * d.double(), dtype)
        assert torch.equal(theta, kept[0])
        assert torch.equal(d, kept[1])

    def test_displace_by_a_vanishing_vector_is_no_step(self):
        theta, zero = torch.randn(5), torch.zeros(5)
        out = torch.full((5,), torch.nan)
        ops.displace(out, theta, zero, 0.1, torch.zeros((), dtype=torch.float64))
        assert torch.equal(out, theta)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tensors_that_are_not_contiguous(self, dtype):
        theta, d = torch.randn(2, 6, 8).to(dtype)
        out = torch.full((8, 12), torch.nan, dtype=dtype)
        ops.displace(out.t()[::2], theta, d, 0.5)
        self.close(out.t()[::2], theta.double() - 0.5 * d.double(), dtype)
        assert bool(out.t()[1::2].isnan().all())
        assert float(ops.grad_dot(theta.t(), d.t())[0][0]) == pytest.approx(
            float((theta.double() * d.double()).sum()), rel=1e-4, abs=1e-5
        )

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

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("lr", [1e-6, 10.0])
    @pytest.mark.parametrize("adamw", [False, True])
    @pytest.mark.parametrize("size", [0, 1, 63, 1025])
    def test_meta_update(self, size, adamw, lr, dtype):
        theta, a, u, m1, theta0 = torch.randn(5, size).to(dtype)
        m2, fisher = torch.rand(2, size).to(dtype)
        mask = torch.rand(size) > 0.3
        control, hyper = decided(lr=lr)
        ops.step_control(control, torch.tensor([0.1, 2.0, 3.0], dtype=torch.float64), torch.ones(1), hyper)
        t, x, y, v, w, t0, f = (z.double() for z in (theta, a, u, m1, m2, theta0, fisher))
        inputs = [z.clone() for z in (a, u, theta0, fisher)]
        g = (x + y) * (1.0 / (2.0 + 0.2 + 3.0) ** 0.5)
        g = g + 0.01 * t.sign() + 0.2 * f * (t - t0) + (0.0 if adamw else 0.5) * t
        if adamw:
            v2, w2 = 0.9 * v + 0.1 * g, 0.999 * w + 0.001 * g * g
            t2 = t * (1 - lr * 0.5) - lr * (v2 / (1 - 0.9**2)) / ((w2 / (1 - 0.999**2)).sqrt() + 1e-8)
        else:
            v2, w2 = 0.9 * v + g, w
            t2 = t - lr * v2
        new = [torch.where(mask, z2, z) for z2, z in ((t2, t), (v2, v), (w2, w))]
        ops.meta_update(
            theta, a, u, m1, m2 if adamw else None,
            control=control, hyper=hyper, theta0=theta0, fisher=fisher, mask=mask,
        )  # fmt: skip
        for found, expected, old in zip((theta, m1, m2), new, (t, v, w), strict=True):
            # a few roundings of what went in, element by element; the sums in g lose the digits that cancel in them
            went_in = old.abs() + expected.abs() + (old.abs() + 3.0) * (lr if found is theta else 1.0)
            roundings = 1e-13 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
            assert bool(((found.double() - expected).abs() <= roundings * went_in).all())
        assert all(torch.equal(z, kept) for z, kept in zip((a, u, theta0, fisher), inputs, strict=True))

    @pytest.mark.parametrize("adamw", [False, True])
    def test_nothing_is_written_when_the_flag_is_down(self, adamw):
        theta, a, u, m1, m2 = (torch.randn(100) for _ in range(5))
        control, hyper = decided(dots=(float("nan"), 1.0, 1.0))
        kept = theta.clone(), m1.clone(), m2.clone()
        ops.meta_update(theta, a * torch.nan, u, m1, m2 if adamw else None, control=control, hyper=hyper)
        assert all(torch.equal(x, y) for x, y in zip((theta, m1, m2), kept, strict=True))

    def test_control(self):
        control, hyper = control_scalars(CPU), hyper_parameters(CPU, clip=0.5)
        dots = torch.tensor([0.0, 9.0, 16.0], dtype=torch.float64)
        ops.step_control(control, dots, torch.ones(2), hyper)
        assert control.tolist() == [1, 1, 0.1]
        cancelling = torch.tensor([-1.0, 1.0, 1.0 - 1e-16], dtype=torch.float64)
        ops.step_control(control, cancelling, torch.ones(2), hyper)
        assert control.tolist() == [1, 2, 1]
        large = torch.full((2,), 40000.0, dtype=torch.float16)  # finite, though their sum in float16 is not
        ops.step_control(control, dots, large, hyper)
        assert control[0] == 1
        ops.step_control(control, dots, torch.tensor([1.0, float("inf")]), hyper)
        assert control[:2].tolist() == [0, 3]
        ops.step_control(control, dots, torch.ones(2), hyper)
        assert control[:2].tolist() == [0, 3]  # for good

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

    def test_a_thousand_repetitions_give_one_bit_pattern(self):
        a, b = torch.randn(2, 5000)
        seen = {ops.grad_dot([a, a[:77]], [b, b[:77]])[1].numpy().tobytes() for _ in range(1000)}
        assert len(seen) == 1
