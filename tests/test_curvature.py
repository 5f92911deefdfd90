"""Second derivatives of our own against torch's, and the forms of the exact gradient against each other."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import direction, minus, norm
from torch import nn
from torch.nn import functional

import fastlur
from fastlur.errors import ModelError
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.passes import Passes
from fastlur.space import ParameterSpace
from fastlur.twice import Twice


class Smooth(nn.Module):
    """Convolutions of several kinds, batch norm, dropout and a parameter that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 6, 3, padding="same", groups=2),
            nn.Conv2d(6, 6, (1, 2), dilation=2),
            nn.BatchNorm2d(6, momentum=None),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(48, 3),
            nn.BatchNorm1d(3),
        )
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.fixture
def job():
    torch.manual_seed(11)
    model = Smooth().double()
    batch = lambda: (torch.randn(5, 2, 8, 7, dtype=torch.float64), torch.randint(0, 3, (5,)))
    return model, batch(), batch()


OPERATIONS = {
    "conv1d": (lambda x, w, b: functional.conv1d(x[:, :, 0], w[:, :, 0], b, 1, 1), (3, 2, 2, 5), (4, 2, 2, 3), (4,)),
    "conv2d": (lambda x, w, b: functional.conv2d(x, w, b, 2, (1, 0)), (3, 2, 6, 5), (4, 2, 3, 2), (4,)),
    "groups": (lambda x, w, b: functional.conv2d(x, w, b, groups=2, dilation=2), (3, 2, 6, 5), (4, 1, 3, 2), (4,)),
    "conv3d": (lambda x, w, b: functional.conv3d(x, w, b, stride=2), (2, 2, 4, 4, 3), (3, 2, 2, 2, 2), (3,)),
    "batch_norm": (lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True), (4, 3, 2, 2), (3,), (3,)),
    "two dims": (lambda x, w, b: functional.batch_norm(x, None, None, w, b, True), (6, 3), (3,), (3,)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_torchs(name):
    operation, *shapes = OPERATIONS[name]
    torch.manual_seed(1)
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found = []
    for ours in (False, True):
        if ours:
            with Twice():
                y = operation(*operands)
            assert type(y.grad_fn).__name__ in ("_ConvolutionBackward", "_BatchNormBackward")
        else:
            y = operation(*operands)
        torch.manual_seed(2)
        g = torch.randn_like(y).requires_grad_()
        first = torch.autograd.grad(y, operands, g, create_graph=True)
        along = [torch.randn_like(each) for each in first]
        second = torch.autograd.grad(first, [g, *operands], along, allow_unused=True)
        found.append([y, *first, *(torch.zeros(()) if each is None else each for each in second)])
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs.expand_as(own), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "groups", "batch_norm", "two dims"])
def test_third_derivatives_are_right(name):
    """Against elementary operations where it is batch norm: torch's own has a wrong third derivative."""
    operation, *shapes = OPERATIONS[name]
    torch.manual_seed(1)
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def spelled(x, w, b):
        over, shape = [0, *range(2, x.dim())], (-1, *[1] * (x.dim() - 2))
        mean, var = x.mean(over).view(shape), x.var(over, correction=0).view(shape)
        return (x - mean) * (var + 1e-5).rsqrt() * w.view(shape) + b.view(shape)

    found = []
    for ours in (False, True):
        if ours:
            with Twice():
                outputs = [operation(*operands)]
        else:
            outputs = [spelled(*operands) if len(shapes[1]) == 1 else operation(*operands)]
        torch.manual_seed(2)
        for _ in range(3):
            # by shape: numbers drawn like a tensor follow its strides
            mixed = sum((each.square() * torch.randn(each.shape, dtype=each.dtype)).sum() for each in outputs)
            outputs = torch.autograd.grad(mixed, operands, create_graph=True)
        found.append(outputs)
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9 * float(theirs.detach().abs().max()))


def test_a_loss_may_hold_a_gradient_penalty(job):
    """Its Hessian is a third derivative of the layers."""
    model, forget, retain = job

    def loss(m, batch):
        x = batch[0].clone().requires_grad_()
        value = functional.cross_entropy(m(x), batch[1])
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + slope.square().sum()

    found = {}
    for gradient in ("exact", "secant", "first_order"):
        with fastlur.MetaStep(
            copy.deepcopy(model), loss, cross_entropy, lr=0.0, gradient=gradient, inner_lr=1e-5
        ) as step:
            step(forget, retain)
            found[gradient] = direction(step)
    part = norm(minus(found["first_order"], found["exact"]))
    assert norm(minus(found["secant"], found["exact"])) < 0.01 * part


def test_buffers_that_a_forward_lives_by_start_where_the_gradient_started():
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 3)).double()
    first.parametrizations.weight[0]._u.copy_(functional.normalize(torch.randn(8), dim=0))  # far from converged
    batch = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    found = []
    for keep_graph in (True, False):
        with fastlur.MetaStep(
            copy.deepcopy(model), lr=0.0, gradient="exact", inner_lr=0.3, keep_graph=keep_graph
        ) as step:
            step(batch, batch)
            found.append(direction(step))
    assert norm(minus(*found)) <= 1e-12 * norm(found[0])


@pytest.mark.parametrize("case", ["eval", "unbatched", "no_grad", "transform"])
def test_what_is_not_of_the_plain_kind_goes_to_torch(case):
    x, w = torch.randn(2, 6, 6), torch.randn(3, 2, 3, 3, requires_grad=True)
    scale = torch.ones(2, requires_grad=True)
    calls = {
        "eval": lambda: functional.batch_norm(x[None], torch.zeros(2), torch.ones(2), scale, scale),
        "unbatched": lambda: functional.conv2d(x, w),
        "no_grad": lambda: torch.no_grad()(functional.conv2d)(x[None], w),
        "transform": lambda: torch.func.grad(lambda v: functional.conv2d(x[None], v).sum())(w.detach()),
    }
    expected = calls[case]()
    with Twice():
        found = calls[case]()
    assert torch.equal(expected, found)
    assert type(found.grad_fn).__name__ not in ("_ConvolutionBackward", "_BatchNormBackward")


@pytest.mark.parametrize("order", ["retain_first", "forget_first"])
def test_a_graph_built_anew_gives_the_same_step(job, order):
    model, forget, retain = job
    found, buffers = [], []
    for keep_graph in (True, False):
        mine = copy.deepcopy(model)
        with fastlur.MetaStep(
            mine, None, negative_cross_entropy, gradient="exact", order=order, inner_lr=0.3, keep_graph=keep_graph
        ) as step:
            step(forget, retain)
            found.append(direction(step))
        buffers.append(dict(mine.named_buffers()) | dict(mine.named_parameters()))
    assert norm(minus(*found)) <= 1e-12 * norm(found[0])
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffer, buffers[1][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep_graph", [True, False])
def test_autograd_and_transforms_agree_while_the_model_stands_elsewhere(job, keep_graph):
    model, forget, retain = job
    space = ParameterSpace(model)
    passes = Passes(space, {"forget": negative_cross_entropy, "retain": cross_entropy}, {"forget": 0.5, "retain": 2.0})
    v, elsewhere = space.vector(), space.copy()
    for flat in (*v.flats, *elsewhere.flats):
        flat.normal_()
    found = []
    for by in ("autograd", "func"):
        a, hv = space.vector(), space.vector()
        with passes.of_step(1, forget, retain):
            product = passes.linearize("retain", a, keep_graph=keep_graph, by=by)
            passes.gradient("forget", space.vector(), elsewhere)  # swaps the storage under whoever is careless
            product(v, hv)
        assert len(space.slots) - len(space.reached) == 1
        found.append([*a.flats, *hv.flats])
    space.close()
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_the_way_of_the_product_can_be_chosen(job):
    model, forget, retain = job
    found = []
    for hessian in ("autograd", "func"):
        with fastlur.MetaStep(copy.deepcopy(model), lr=0.0, gradient="exact", inner_lr=0.3, hessian=hessian) as step:
            step(forget, retain)
            assert step.state.hessian == hessian
            found.append(direction(step))
    assert norm(minus(*found)) <= 1e-10 * norm(found[0])
    with pytest.raises(fastlur.ArgumentError, match="hessian='fun' is unknown; did you mean 'func'"):
        fastlur.LUR(hessian="fun")


@pytest.mark.parametrize("by", ["autograd", "func"])
def test_a_model_that_cannot_be_differentiated_twice_is_named(job, by):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 2

    model, forget, retain = job
    loss = lambda m, batch: functional.cross_entropy(Once.apply(m(batch[0])), batch[1])
    space = ParameterSpace(model)
    passes = Passes(space, {"forget": cross_entropy, "retain": loss}, {"forget": 0.5, "retain": 2.0})
    with passes.of_step(1, forget, retain), pytest.raises(ModelError, match="use 'secant'"):
        passes.linearize("retain", space.vector(), by=by)
    space.close()
    with fastlur.MetaStep(model, loss, gradient="exact") as step, pytest.raises(ModelError, match="use 'secant'"):
        step(forget, retain)
