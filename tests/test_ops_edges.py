"""Numbers and tensors at the edge of what the operations take: one verdict, or one value, on every backend."""

from __future__ import annotations

import math

import backend_cases as cases
import pytest
import torch
from helpers import decided
from kernel_cases import DEVICE
from torch.autograd import forward_ad

import fastlur
from fastlur import ops
from fastlur.operands import control_scalars, hyper_parameters

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="asks who serves tensors on the CPU")
every_backend = pytest.mark.parametrize("served", cases.BACKENDS, indirect=True)
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def served(request):
    with cases.through(request.param):
        yield request.param


@every_backend
@pytest.mark.parametrize("weight", [*HALVES, torch.float32])
@pytest.mark.parametrize("first", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("second", [*HALVES, torch.float32, torch.float64])
def test_both_moments_are_of_one_dtype_that_of_the_weights_or_float32(served, weight, first, second):
    theta, a = torch.ones(9, dtype=weight), torch.ones(9, dtype=weight)
    m, v = torch.zeros(9, dtype=first), torch.zeros(9, dtype=second)
    control, hyper = decided()
    if first == second and first in (weight, torch.float32):
        ops.meta_update(theta, a, None, m, v, control=control, hyper=hyper)
        assert bool((theta != 1).all() and (v != 0).all())
        return
    wrong, wanted = ("moment2", first) if first in (weight, torch.float32) else ("moment1", weight)
    with pytest.raises(fastlur.ArgumentError, match=rf"^{wrong}\[0\] is .*; it must be {wanted}$"):
        ops.meta_update(theta, a, None, m, v, control=control, hyper=hyper)
    assert bool((theta == 1).all() and (m == 0).all() and (v == 0).all())


def calls():
    """Every operation on a tensor x in each of its places."""
    y, control, hyper = torch.ones(5), *decided()
    dots = torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64)
    return {
        "grad_dot a": lambda x: ops.grad_dot(x, y),
        "grad_dot b": lambda x: ops.grad_dot(y, x),
        "displace theta": lambda x: ops.displace(y, x, y, 0.5),
        "displace d": lambda x: ops.displace(y, y, x, 0.5),
        "displace alpha": lambda x: ops.displace(y, y, y, x[0]),
        "displace norm2": lambda x: ops.displace(y, y, y, 1.0, x[0].double()),
        "displace out": lambda x: ops.displace(x, y, y, 0.5),
        "project a": lambda x: ops.project(x, y, dots),
        "project dots": lambda x: ops.project(y, y.clone(), x[:3].double()),
        "regularize theta": lambda x: ops.regularize(y, x, l2=0.5),
        "regularize l1": lambda x: ops.regularize(y, y, l1=x[0]),
        "meta_update a": lambda x: ops.meta_update(y, x, None, y.clone(), control=control, hyper=hyper),
        "extrapolate theta0": lambda x: ops.extrapolate(y, x, y.clone(), 2.0),
        "extrapolate eta": lambda x: ops.extrapolate(y, y.clone(), y.clone(), 2.0, x[0]),
        "saliency grad": lambda x: ops.saliency(y, x),
        "saliency theta": lambda x: ops.saliency(y, y.clone(), x),
        "step_control losses": lambda x: ops.step_control(control, dots, x, hyper),
        "threshold scores": lambda x: ops.threshold(x, 0.5),
    }


@every_backend
@pytest.mark.parametrize("case", calls())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forward_ad imports deprecated parts of torch
def test_a_tangent_is_refused_not_lost(served, case):
    call = calls()[case]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(5), torch.ones(5))
        with pytest.raises(fastlur.ArgumentError, match=rf"^{case.split()[1]}: has a tangent .* unpack_dual"):
            call(dual)
        call(forward_ad.unpack_dual(dual).primal)  # the level alone is no reason


# the interpreter computes with numpy, which warns of 0·∞ before it is left out
beside_infinity = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@every_backend
@beside_infinity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("alpha", "norm2"), [(1.0, math.inf), (1.0, 0.0), (1.0, math.nan), (0.0, None), (-0.0, None), (1e-50, None)]
)
def test_by_a_factor_of_zero_nothing_is_displaced(served, dtype, alpha, norm2):
    """Not even by an infinite vector, whose own norm is infinite too."""
    theta = torch.tensor([1.0, -2.0, 3.0, -0.0, 5.0], dtype=dtype)
    d = torch.tensor([math.inf, 1.0, math.nan, -math.inf, 0.0], dtype=dtype)
    out = torch.full_like(theta, math.nan)
    ops.displace(out, theta, d, alpha, None if norm2 is None else torch.tensor(norm2, dtype=torch.float64))
    if alpha == 1e-50 and dtype == torch.float64:  # is no zero there
        assert out.isnan().any()
        return
    assert torch.equal(out, theta) and torch.equal(out.signbit(), theta.signbit())


@every_backend
@beside_infinity
def test_an_infinite_vector_does_not_displace_by_its_own_norm(served):
    theta, d, out = torch.ones(2), torch.tensor([math.inf, 1.0]), torch.empty(2)
    dots, _ = ops.grad_dot(d, d)
    ops.displace(out, theta, d, 0.5, dots[1])
    assert out.tolist() == [1.0, 1.0]


@every_backend
@beside_infinity
@pytest.mark.parametrize("term", ["l2", "l1", "prox"])
def test_a_penalty_whose_factor_rounds_to_zero_is_absent(served, term):
    """From value and gradient, beside infinite weights too; in float64, where it does not round, it is there."""
    for dtype in (torch.float32, torch.float64):
        theta = torch.tensor([math.inf, 1.0], dtype=dtype)
        grad, zero, moment = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)
        value = ops.regularize(grad, theta, zero, **{term: 1e-50})
        if dtype == torch.float64:
            assert float(value) == math.inf and float(grad[0]) == (1 if term == "l1" else math.inf)
            continue
        assert float(value) == 0 and grad.tolist() == [1.0, 1.0]
        control = control_scalars("cpu")
        hyper = hyper_parameters("cpu", lr=0.5, **{term.replace("l2", "weight_decay"): 1e-50})
        ops.meta_update(theta, grad, None, moment, control=control, hyper=hyper, theta0=zero)
        assert theta.tolist() == [math.inf, 0.5] and moment.tolist() == [1.0, 1.0]


@every_backend
@pytest.mark.parametrize("place", [0, 1])
def test_a_negative_view_is_read_and_not_written(served, place):
    base = torch.arange(1.0, 6.0)
    seen = torch._neg_view(base)
    tensors = [[torch.ones(5)], [torch.ones(5), seen]][place]
    others = [torch.ones(5) for _ in tensors]
    out = [torch.empty(5) for _ in tensors]
    tensors[place] = seen
    ops.displace(out, others, tensors, 1.0)
    assert torch.equal(out[place], 1 + base)
    dots, _ = ops.grad_dot(tensors, others)
    assert float(dots[0]) == 5 * place - float(base.sum())
    with pytest.raises(
        fastlur.ArgumentError, match=r"displace: a tensor that it writes is a negative view; .*resolve_neg"
    ):
        ops.displace(tensors, others, others, 1.0)
    assert torch.equal(base, torch.arange(1.0, 6.0))


@every_backend
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(served):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    y, (control, hyper) = torch.ones(5), decided()
    for call, said in (
        (lambda: ops.grad_dot(nested, nested), r"^a\[0\] is a nested tensor; pass its unbind"),
        (lambda: ops.displace(y, y, nested, 0.5), r"^d\[0\] is a nested tensor; pass its unbind"),
        (lambda: ops.threshold(nested, 0.5), r"^scores\[0\] is a nested tensor; pass its unbind"),
        (lambda: ops.displace(y, y, y, nested), r"^alpha: a nested tensor is no hyper-parameter"),
        (lambda: ops.step_control(control, torch.ones(3).double(), nested, hyper), r"^losses: is a nested tensor"),
    ):
        with pytest.raises(fastlur.ArgumentError, match=said):
            call()


@every_backend
def test_complex_losses_are_refused(served, recwarn):
    control, hyper = decided()
    with pytest.raises(fastlur.ArgumentError, match=r"^losses: are torch\.complex64; pass real numbers"):
        ops.step_control(control, torch.ones(3).double(), torch.full((2,), 1j), hyper)
    assert not recwarn.list


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "minus that"])
def test_integers_beyond_every_float_are_refused(value):
    x = torch.ones(3)
    for call, said in (
        (lambda: ops.displace(x, x, x, value), "^alpha: is too large"),
        (lambda: ops.extrapolate(x, x, x, 1.0, value), "^eta: is too large"),
        (lambda: ops.regularize(x, x, prox=value), "^prox: is too large"),
        (lambda: hyper_parameters("cpu", lr=value), "^lr: is too large"),
        (lambda: ops.threshold(x, value), "^sparsity=.* must be"),
    ):
        with pytest.raises(fastlur.ArgumentError, match=said):
            call()
    assert torch.equal(x, torch.ones(3))


def test_integers_that_only_a_float_can_hold_are_numbers():
    assert float(hyper_parameters("cpu", lr=10**30)[0]) == 1e30
    x, out = torch.ones(3), torch.empty(3)
    ops.displace(out, x, x, 10**30)
    assert torch.equal(out, torch.full((3,), 1 - 1e30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_sparsity_is_any_number_that_alpha_may_be(dtype, shape):
    """Its decimal digits count, in whatever dtype: each of these is a little more or less."""
    scores = torch.arange(1.0, 101.0)
    for share in (0.0, 0.07, 0.29, 0.57, 0.58, 1.0):
        assert float(ops.threshold(scores, torch.full(shape, share, dtype=dtype))) == max(1, round(100 * share))
    whole = torch.ones(shape, dtype=torch.int64)
    assert float(ops.threshold(scores, whole)) == 100
    for wrong in (torch.ones(2), torch.ones((), device="meta"), torch.full((), 1j)):
        with pytest.raises(fastlur.ArgumentError, match="must be a number in"):
            ops.threshold(scores, wrong)


class Watched(torch.Tensor):
    """A tensor that holds another one, and records what is done to it; its own memory holds nothing."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held, self.seen = held, []

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        watched = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, cls)]
        result = function(*torch.utils._pytree.tree_map_only(cls, lambda x: x.held, args), **(kwargs or {}))
        for each in watched:
            each.seen.append(str(function))
        if not isinstance(result, torch.Tensor):
            return result
        wrapped = cls(result)
        wrapped.seen = watched[0].seen  # what is done to a view is done to it
        return wrapped


@every_backend
def test_a_subclass_sees_the_operation(served):
    """By the dispatcher: its values are not where its memory is."""
    x = Watched(torch.arange(5.0))
    total, _ = ops.grad_dot(x, x)
    assert "fastlur.grad_dot.default" in x.seen and float(total[0]) == 30
