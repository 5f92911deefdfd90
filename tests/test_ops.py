"""The operations as the package calls them: their schemas, their arguments, who serves them, and the plain truth."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastlur
from fastlur import backends, ops, reference
from fastlur.operands import control_scalars, hyper_parameters

SIZES = (0, 1, 63, 1023, 1025, 2**20 + 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU = torch.device("cpu")
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "l1": 0.01, "prox": 0.2, "clip": 1.0}


def vectors(count: int, shapes=((7,), (3, 5), (0,), (64,)), dtype=torch.float32) -> list[list[Tensor]]:
    return [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(count)]


def decided(dots=(0.1, 2.0, 3.0), **hyper) -> tuple[Tensor, Tensor]:
    control, packed = control_scalars(CPU), hyper_parameters(CPU, **(HYPER | hyper))
    ops.step_control(control, torch.tensor(dots, dtype=torch.float64), torch.ones(2), packed)
    return control, packed


def examples() -> dict[str, tuple]:
    """Arguments for every registered operation."""
    control, hyper = decided()
    v = vectors(8)
    mask = [x > 0 for x in v[7]]
    dots = torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64)
    scalar = torch.tensor(0.3, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    positive = [x.abs() for x in v[6]]
    return {
        "grad_dot": (v[0], v[1]),
        "displace": (v[0], v[1], v[2], scalar, one),
        "project": (v[0], v[1], dots, "symmetric"),
        "regularize": (v[0], v[1], v[2], positive, hyper),
        "step_control": (control, dots, torch.ones(2), hyper),
        "meta_update": (v[0], v[1], v[2], v[3], positive, v[4], positive, mask, control, hyper),
        "extrapolate": (v[0], v[1], v[2], scalar, one),
        "saliency": (v[0], v[1], v[2]),
    }


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_the_registration_is_sound(name):
    torch.library.opcheck(getattr(torch.ops.fastlur, name).default, examples()[name])


def test_every_operation_is_registered_and_served_by_every_backend():
    from fastlur import _extension, kernels

    assert set(ops.SCHEMAS) == set(backends.OPERATIONS)
    for name in ops.SCHEMAS:
        assert all(callable(getattr(module, name)) for module in (reference, _extension, kernels))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler imports deprecated parts of torch
def test_a_function_that_uses_them_compiles_as_one_graph():
    def step(theta, a, u, moment, point, control, hyper):
        total, _ = ops.grad_dot(a, u)
        ops.displace(point, theta, a, 0.1, total[1])
        ops.step_control(control, total, torch.ones(2), hyper)
        ops.meta_update(theta, a, u, moment, control=control, hyper=hyper)
        return total

    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        arguments = vectors(5)
        control, hyper = control_scalars(CPU), hyper_parameters(CPU, **HYPER)
        go = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        total = go(*arguments, control, hyper)
        results.append([total, control, *itertools.chain(*arguments)])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


class TestArguments:
    def good(self) -> dict:
        a, b = vectors(2)
        return {"a": a, "b": b}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda a, b: (a, b[:-1]), "b has 3 tensors, a has 4"),
            (lambda a, b: (a, [b[0][:5], *b[1:]]), r"b\[0\] has shape \(5,\), a\[0\] \(7,\)"),
            (lambda a, b: (a, [b[0].double(), *b[1:]]), r"b\[0\] is torch\.float64; it must be torch\.float32"),
            (lambda a, b: ([a[0].long(), *a[1:]], b), r"a\[0\] is torch\.int64"),
            (lambda a, b: (a, [b[0].to("meta"), *b[1:]]), r"b\[0\] is on meta, a\[0\] on cpu"),
            (lambda a, b: ([a[0], a[1].to("meta"), *a[2:]], b), r"a\[1\] is on meta, a\[0\] on cpu"),
        ],
    )
    @pytest.mark.parametrize("operation", ["grad_dot", "project", "displace"])
    def test_vectors_that_do_not_fit_are_named(self, operation, change, said):
        a, b = change(*vectors(2))
        before = [x.clone() for x in a + b]
        calls = {
            "grad_dot": lambda: ops.grad_dot(a, b),
            "project": lambda: ops.project(a, b, torch.zeros(3, dtype=torch.float64)),
            "displace": lambda: ops.displace(a, b, b, 0.1),
        }
        if operation == "displace":
            said = re.sub(r"\b([ab])( has|\\\[)", lambda m: {"a": "out", "b": "theta"}[m[1]] + m[2], said)
        with pytest.raises(fastlur.ArgumentError, match=said):
            calls[operation]()
        assert all(torch.equal(x, y) for x, y in zip(a + b, before, strict=True) if x.device.type == "cpu")

    def test_the_rest(self):
        a, b, c, d = vectors(4)
        control, hyper = decided()
        for call, said in (
            (lambda: ops.project(a, b, torch.zeros(3), "both"), "kind='both'"),
            (lambda: ops.project(a, b, torch.zeros(3)), r"dots: is torch.float32 of shape \(3,\)"),
            (lambda: ops.meta_update(a, b, c, d, control=control[:2], hyper=hyper), r"control: is .* shape \(2,\)"),
            (lambda: ops.meta_update(a, b, c, d, control=control, hyper=hyper[:5]), r"hyper: is .* shape \(5,\)"),
            (lambda: ops.displace(a, b, c, torch.ones(2)), "no hyper-parameter"),
            (lambda: ops.regularize(a, b, fisher=c), "needs theta0"),
            (lambda: ops.meta_update(a, b, c, d, control=control, hyper=hyper, fisher=b), "needs theta0"),
            (lambda: ops.meta_update(a, b, c, d, control=control, hyper=hyper, mask=b), r"mask\[0\] is torch.float32"),
            (lambda: ops.threshold(a, 1.5), "sparsity=1.5"),
            (lambda: ops.threshold([], 0.5), "scores"),
        ):
            with pytest.raises(fastlur.ArgumentError, match=said):
                call()

    def test_a_flat_buffer_is_a_list_of_one(self):
        a, b = torch.randn(2, 50)
        assert torch.equal(ops.grad_dot(a, b)[0], ops.grad_dot([a], [b])[0])

    def test_numbers_and_scalars_are_the_same(self):
        theta, d = vectors(2)
        found = []
        for alpha in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
            out = [torch.full_like(x, torch.nan) for x in theta]
            ops.displace(out, theta, d, alpha)
            found.append(torch.cat([x.flatten() for x in out]))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_empty_lists(self):
        control, hyper = decided()
        assert torch.equal(ops.grad_dot([], [])[0], torch.zeros(3, dtype=torch.float64))
        assert float(ops.regularize([], [])) == 0
        ops.displace([], [], [], 0.1)
        ops.project([], [], torch.zeros(3, dtype=torch.float64))
        ops.meta_update([], [], None, [], control=control, hyper=hyper)
        ops.extrapolate([], [], [], 4.0)
        ops.saliency([], [])


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_tensors_that_require_grad_are_taken_as_finished(name):
    arguments = examples()[name]

    def parameters(argument):
        if isinstance(argument, list) and argument[0].is_floating_point():
            return [torch.nn.Parameter(x) for x in argument]
        return argument

    results = []
    for wrap in (lambda x: x, parameters):
        copies = [[x.clone() for x in a] if isinstance(a, list) else a for a in arguments]
        copies = [a.clone() if isinstance(a, Tensor) else a for a in copies]
        given = [wrap(a) for a in copies]
        returned = getattr(torch.ops.fastlur, name)(*given)
        outputs = [returned] if isinstance(returned, Tensor) else list(returned or ())
        held = [x for a in given for x in (a if isinstance(a, list) else [a]) if isinstance(x, Tensor)]
        results.append([x.detach() for x in held + outputs])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_what_comes_out_is_not_differentiable():
    weight = torch.nn.Parameter(torch.randn(5))
    assert not ops.grad_dot(weight, weight)[0].requires_grad
    assert not ops.regularize(torch.zeros(5), weight, l2=1.0).requires_grad


def test_a_graph_that_saved_what_is_overwritten_fails_at_its_backward():
    weight = torch.nn.Parameter(torch.randn(5))
    loss = weight.square().sum()
    ops.displace(weight, weight, torch.ones(5), 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TestBackends:
    @pytest.mark.parametrize("name", ["torch", "triton", "extension"])
    def test_info_works_whatever_is_forced(self, name):
        with backends.backend(name):
            cpu = fastlur.info()["operations"]["displace"]["cpu"]
        assert cpu["served_by"] == name or name in cpu["because"]

    def test_one_can_be_forced_and_says_why_it_cannot_serve(self):
        a, b = vectors(2)
        with backends.backend("torch"):
            assert backends.serving("cpu") == "torch"
            ops.grad_dot(a, b)
        with (
            backends.backend("triton"),
            pytest.raises(fastlur.ArgumentError, match="backend='triton' cannot serve cpu tensors: Triton kernels run"),
        ):
            ops.grad_dot(a, b)
        with pytest.raises(fastlur.ArgumentError, match="did you mean 'triton'"), backends.backend("tritn"):
            pass

    def test_the_environment_forces_one(self):
        code = "import torch, fastlur.ops; fastlur.ops.grad_dot(torch.ones(2), torch.ones(2))"
        done = subprocess.run(
            [sys.executable, "-c", code], env={"FASTLUR_BACKEND": "triton"}, capture_output=True, text=True, check=False
        )
        assert "ArgumentError: backend='triton' cannot serve cpu tensors" in done.stderr

    def test_who_serves_is_who_computes(self, monkeypatch):
        called = []
        monkeypatch.setattr(reference, "saliency", lambda *_: called.append("torch"))
        with backends.backend("torch"):
            ops.saliency(*vectors(2))
        assert called == ["torch"]

    def test_info_tells_who_serves_what_and_why_the_others_do_not(self):
        found = fastlur.info()["operations"]
        assert set(found) == set(ops.SCHEMAS)
        for entry in found.values():
            cpu = entry["cpu"]
            assert cpu["served_by"] in ("torch", "extension")
            assert {cpu["served_by"], *cpu["others"]} == {"torch", "triton", "extension"}
            assert all(isinstance(reason, str) and reason for reason in cpu["others"].values())

    def test_no_kernel_claims_more_than_it_has_been_through(self):
        """Until a result from a GPU is committed, what runs there is called what it is."""
        from pathlib import Path

        results = list((Path(__file__).parent.parent / "bench" / "results").glob("gpu*.json"))
        if not results:
            assert backends.CHECKED["triton", "cuda"] == "interpreter only"
            assert backends.CHECKED["extension", "cuda"] == "compiled only"
            readme = (Path(__file__).parent.parent / "README.md").read_text()
            assert "interpreter only" in readme
            assert "compiled only" in readme


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


def test_the_layouts_of_kernels_and_extension_agree_with_the_reference():
    from fastlur.kernels import layout

    names = ("LR", "MOMENTUM", "BETA2", "EPS", "WEIGHT_DECAY", "L1", "PROX", "CLIP", "OK", "COUNT", "SCALE")
    for name in names:
        value = getattr(layout, name)
        assert getattr(value, "value", value) == getattr(reference, name)
