"""The four gradients against closed forms, through the functional form and through the storage swap alike."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import MODES, ORDERS, Point, direction, minus, mlp, norm
from torch.func import functional_call
from torch.nn import functional

import fastlur


def through_function(model, inner, outer, alpha, gradient, relative=False, calls=1):
    """The directions of `calls` calls at fixed parameters; inner and outer are losses of a module."""
    params = dict(model.named_parameters())
    previous = {} if gradient == "optimistic" else None

    def of(loss):
        return lambda p: loss(lambda *a: functional_call(model, p, a))

    return [
        fastlur.meta_gradient(of(inner), of(outer), params, alpha, gradient, relative, previous) for _ in range(calls)
    ]


def through_step(model, inner, outer, alpha, gradient, relative=False, calls=1):
    """The same by `MetaStep` at lr = 0."""
    step = fastlur.MetaStep(
        model,
        loss=lambda m, _: inner(m),
        forget_loss=lambda m, _: outer(m),
        lr=0.0,
        gradient=gradient,
        inner_lr=alpha,
        relative_inner_lr=relative,
    )
    found = []
    with step:
        for _ in range(calls):
            step(None, None)
            found.append(direction(step))
    return found


WAYS = pytest.mark.parametrize("way", [through_function, through_step])


def spd(n: int) -> torch.Tensor:
    root = torch.randn(n, n, dtype=torch.float64)
    return root @ root.T / n + torch.eye(n, dtype=torch.float64)


class TestQuadratics:
    """A = ½xᵀPx − pᵀx and B = ½xᵀQx − qᵀx: every mode has a closed form, and secant is exact."""

    def setup_method(self):
        torch.manual_seed(3)
        self.x = torch.randn(5, dtype=torch.float64)
        self.P, self.Q = spd(5), spd(5)
        self.p, self.q = torch.randn(2, 5, dtype=torch.float64)
        self.model = Point(self.x)

    def inner(self, model):
        x = model()
        return x @ self.P @ x / 2 - self.p @ x

    def outer(self, model):
        x = model()
        return x @ self.Q @ x / 2 - self.q @ x

    def grad_a(self, x):
        return self.P @ x - self.p

    def grad_b(self, x):
        return self.Q @ x - self.q

    @WAYS
    @pytest.mark.parametrize("gradient", MODES)
    @pytest.mark.parametrize("alpha", [0.0, 0.03, 0.7])
    def test_first_direction(self, way, gradient, alpha):
        a = self.grad_a(self.x)
        u = self.grad_b(self.x - alpha * a)
        expected = a + u if gradient == "first_order" else a + u - alpha * self.P @ u
        (found,) = way(self.model, self.inner, self.outer, alpha, gradient)
        torch.testing.assert_close(found["x"], expected, rtol=1e-12, atol=1e-12)

    @WAYS
    def test_exact_is_the_gradient_of_the_objective(self, way):
        x = self.x.clone().requires_grad_()
        composed = self.inner(lambda: x) + self.outer(lambda: x - 0.3 * self.grad_a(x))
        (expected,) = torch.autograd.grad(composed, x)
        (found,) = way(self.model, self.inner, self.outer, 0.3, "exact")
        torch.testing.assert_close(found["x"], expected, rtol=1e-12, atol=1e-12)

    @WAYS
    def test_optimistic_reuses_the_last_aligned_gradient(self, way):
        alpha, x = 0.2, self.x
        d = self.grad_a(x)
        expected = []
        for _ in range(3):
            u = self.grad_b(x - alpha * d)
            d = self.grad_a(x - alpha * u)
            expected.append(d + u)
        found = way(self.model, self.inner, self.outer, alpha, "optimistic", calls=3)
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one["x"], wanted, rtol=1e-12, atol=1e-12)

    @WAYS
    @pytest.mark.parametrize("gradient", MODES)
    def test_relative_step_has_the_length_asked_for(self, way, gradient):
        rho, a = 0.25, self.grad_a(self.x)
        u = self.grad_b(self.x - rho * a / a.norm())
        aligned = rho / max(a.norm(), u.norm()) * self.P @ u
        expected = a + u if gradient == "first_order" else a + u - aligned
        (found,) = way(self.model, self.inner, self.outer, rho, gradient, relative=True)
        torch.testing.assert_close(found["x"], expected, rtol=1e-12, atol=1e-12)

    @WAYS
    @pytest.mark.parametrize("gradient", MODES)
    @pytest.mark.parametrize("size", [1e-9, 1e9])
    def test_no_displacement_of_a_relative_step_is_longer_than_that(self, way, gradient, size):
        """However small the inner gradient is beside the outer one, as in a model that has been trained."""
        seen = []

        def looked_at(model):
            seen.append(float(torch.as_tensor(model()).detach().sub(self.x).norm()))
            return self.inner(model) * size

        def outer(model):
            seen.append(float(torch.as_tensor(model()).detach().sub(self.x).norm()))
            return self.outer(model)

        way(self.model, looked_at, outer, 0.25, gradient, relative=True, calls=3)
        assert len(seen) >= 6
        assert 0.2 < max(seen) < 0.25 + 1e-9

    @WAYS
    @pytest.mark.parametrize("gradient", MODES)
    def test_relative_step_of_a_vanishing_gradient_is_zero(self, way, gradient):
        self.p = torch.zeros(5, dtype=torch.float64)
        model = Point(self.p)  # at the minimum of A
        u = self.grad_b(self.p)
        expected = u if gradient == "first_order" else u - 0.5 / u.norm() * self.P @ u
        (found,) = way(model, self.inner, self.outer, 0.5, gradient, relative=True)
        torch.testing.assert_close(found["x"], expected, rtol=1e-12, atol=1e-12)


class TestCubic:
    """A = x³/3, B = κx³/3: the orders agree to O(α) and differ by 5κ(1 − κ)x⁴α² + O(α³)."""

    kappa, x = 0.4, 1.3

    def closed_form(self, order, alpha):
        inner, outer = (1.0, self.kappa) if order == "retain_first" else (self.kappa, 1.0)
        a = inner * self.x**2
        u = outer * (self.x - alpha * a) ** 2
        return a + u * (1 - 2 * alpha * inner * self.x)

    def by_step(self, order, alpha, gradient="exact"):
        model = Point(torch.tensor([self.x], dtype=torch.float64))
        cube = lambda m, _: (m() ** 3).sum() / 3
        with fastlur.MetaStep(
            model, cube, cube, lr=0.0, gradient=gradient, order=order, inner_lr=alpha, forget_weight=self.kappa
        ) as step:
            step(None, None)
            return float(direction(step)["x"])

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("alpha", [1e-3, 0.1])
    def test_each_order_minimises_its_own_objective(self, order, alpha):
        assert self.by_step(order, alpha) == pytest.approx(self.closed_form(order, alpha), rel=1e-12)

    def test_the_orders_differ_at_second_order(self):
        alpha = 1e-4
        difference = self.by_step("retain_first", alpha) - self.by_step("forget_first", alpha)
        assert difference / alpha**2 == pytest.approx(5 * self.kappa * (1 - self.kappa) * self.x**4, rel=1e-2)

    def test_the_functional_form_tells_them_apart_too(self):
        params = {"x": torch.tensor([self.x], dtype=torch.float64)}
        retain = lambda p: (p["x"] ** 3).sum() / 3
        forget = lambda p: self.kappa * (p["x"] ** 3).sum() / 3
        for order, pair in zip(ORDERS, [(retain, forget), (forget, retain)], strict=True):
            found = float(fastlur.meta_gradient(*pair, params, inner_lr=0.1)["x"])
            assert found == pytest.approx(self.closed_form(order, 0.1), rel=1e-12)

    @pytest.mark.parametrize("order", ORDERS)
    def test_the_halves_are_called_by_what_they_are(self, order):
        model = Point(torch.tensor([self.x], dtype=torch.float64))
        cube = lambda m, _: (m() ** 3).sum() / 3
        with fastlur.MetaStep(
            model, cube, cube, lr=0.0, gradient="first_order", order=order, inner_lr=0.0, forget_weight=self.kappa
        ) as step:
            stats = step(None, None)
        assert float(stats.retain_norm) == pytest.approx(self.x**2)
        assert float(stats.forget_norm) == pytest.approx(self.kappa * self.x**2)

    @pytest.mark.parametrize("order", ORDERS)
    def test_secant_and_exact_part_at_second_order_only(self, order):
        errors = [abs(self.by_step(order, a, "secant") - self.by_step(order, a)) for a in (1e-3, 1e-2)]
        assert errors[1] / errors[0] == pytest.approx(100, rel=0.2)


class TestSmoothNetwork:
    """A tanh network in float64."""

    def setup_method(self):
        torch.manual_seed(5)
        self.model = mlp(dtype=torch.float64)
        x = torch.randn(2, 24, 6, dtype=torch.float64)
        y = torch.randint(0, 4, (2, 24))
        self.inner = lambda m: functional.cross_entropy(m(x[0]), y[0])
        self.outer = lambda m: -0.3 * functional.cross_entropy(m(x[1]), y[1])

    def by_hand(self, alpha):
        """Double backward through the graph of the gradient, written out."""
        params = dict(self.model.named_parameters())
        values = list(params.values())
        a = torch.autograd.grad(self.inner(self.model), values, create_graph=True)
        moved = copy.deepcopy(self.model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), a, strict=True):
                p.sub_(alpha * g)
        u = torch.autograd.grad(self.outer(moved), list(moved.parameters()))
        hu = torch.autograd.grad(a, values, grad_outputs=u)
        return {n: (x + y - alpha * z).detach() for n, x, y, z in zip(params, a, u, hu, strict=True)}

    @WAYS
    def test_exact_equals_a_double_backward_by_hand(self, way):
        expected = self.by_hand(0.5)
        (found,) = way(self.model, self.inner, self.outer, 0.5, "exact")
        assert norm(minus(found, expected)) <= 1e-10 * norm(expected)
        (plain,) = way(self.model, self.inner, self.outer, 0.5, "first_order")
        assert norm(minus(plain, expected)) > 1e-3 * norm(expected)  # the Hessian's part matters here

    @WAYS
    def test_secant_approaches_exact_with_slope_two(self, way):
        assert self.slope(way, lambda a: way(self.model, self.inner, self.outer, a, "exact")[0], "secant", 1) == (
            pytest.approx(2, abs=0.05)
        )

    @WAYS
    def test_optimistic_equals_secant_in_its_first_step(self, way):
        (one,) = way(self.model, self.inner, self.outer, 0.1, "optimistic")
        (two,) = way(self.model, self.inner, self.outer, 0.1, "secant")
        assert all(torch.equal(one[name], two[name]) for name in one)

    @WAYS
    @pytest.mark.parametrize("call", [2, 3])
    def test_optimistic_later_differs_from_secant_with_slope_two(self, way, call):
        secant = lambda a: way(self.model, self.inner, self.outer, a, "secant")[0]
        assert self.slope(way, secant, "optimistic", call) == pytest.approx(2, abs=0.05)

    def slope(self, way, target, gradient, calls):
        """Of log error against log α, fitted over four decades."""
        alphas = torch.logspace(-4.5, -0.5, 9, dtype=torch.float64)
        errors = [
            norm(minus(way(self.model, self.inner, self.outer, float(a), gradient, calls=calls)[-1], target(float(a))))
            for a in alphas
        ]
        x, y = alphas.log(), torch.tensor(errors, dtype=torch.float64).log()
        return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


class TestFunctionalForm:
    def losses(self):
        return (lambda p: (p["x"] ** 2).sum() / 2), (lambda p: p["x"].sum())

    def test_leaves_its_arguments_alone_and_works_under_no_grad(self):
        params = {"x": torch.tensor([1.0, 2.0], requires_grad=True)}
        before = params["x"].detach().clone()
        with torch.no_grad():
            found = fastlur.meta_gradient(*self.losses(), params, inner_lr=0.1)
        torch.testing.assert_close(found["x"], torch.tensor([1.9, 2.9]))
        assert torch.equal(params["x"], before)
        assert params["x"].grad is None
        assert not found["x"].requires_grad

    def test_keeps_mixed_dtypes(self):
        params = {"x": torch.ones(2), "y": torch.ones(3, dtype=torch.float64)}
        inner = lambda p: (p["x"] ** 2).sum() + (p["y"] ** 2).sum().float()
        found = fastlur.meta_gradient(inner, inner, params, inner_lr=0.1, gradient="secant", relative=True)
        assert {k: v.dtype for k, v in found.items()} == {"x": torch.float32, "y": torch.float64}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"gradient": "secnat"}, "did you mean 'secant'"),
            ({"inner_lr": -1.0}, "inner_lr=-1.0"),
            ({"inner_lr": float("nan")}, "inner_lr=nan"),
            ({"params": {}}, "params"),
            ({"params": {"x": torch.ones(2, dtype=torch.int64)}}, "torch.int64"),
            ({"previous": {"z": torch.ones(2)}, "gradient": "optimistic"}, "previous"),
        ],
    )
    def test_bad_arguments_are_named(self, change, said):
        arguments = {"params": {"x": torch.ones(2)}, "inner_lr": 0.1} | change
        with pytest.raises(fastlur.ArgumentError, match=said):
            fastlur.meta_gradient(*self.losses(), **arguments)

    def test_a_loss_that_is_no_scalar_is_named(self):
        with pytest.raises(fastlur.DataError, match="scalar"):
            fastlur.meta_gradient(lambda p: p["x"], lambda p: p["x"].sum(), {"x": torch.ones(2)}, 0.1)
