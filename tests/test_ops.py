"""The operations as the package calls them: their schemas, their arguments, who serves them, and the plain truth."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
import torch
from helpers import HYPER, decided
from torch import Tensor

import fastlur
from fastlur import backends, ops, reference
from fastlur.operands import control_scalars, hyper_parameters

CPU = torch.device("cpu")


def vectors(count: int, shapes=((7,), (3, 5), (0,), (64,)), dtype=torch.float32) -> list[list[Tensor]]:
    return [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(count)]


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


def test_the_layouts_of_kernels_and_extension_agree_with_the_reference():
    from fastlur.kernels import layout

    names = ("LR", "MOMENTUM", "BETA2", "EPS", "WEIGHT_DECAY", "L1", "PROX", "CLIP", "OK", "COUNT", "SCALE")
    for name in names:
        value = getattr(layout, name)
        assert getattr(value, "value", value) == getattr(reference, name)
