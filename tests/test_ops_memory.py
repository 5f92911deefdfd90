"""Where operands lie: what overlaps is refused, whoever serves, and the order of elements in memory costs nothing."""

from __future__ import annotations

from unittest import mock

import backend_cases as cases
import pytest
import torch
from helpers import decided
from kernel_cases import DEVICE, same
from torch import Tensor

import fastlur
from fastlur import _extension, backends, ops, reference

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="asks who serves tensors on the CPU")
DOTS = torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64)
every_backend = pytest.mark.parametrize("served", cases.BACKENDS, indirect=True)


@pytest.fixture
def served(request):
    with cases.through(request.param):
        yield request.param


def update(*lists, **others):
    control, hyper = decided()
    ops.meta_update(*lists, control=control, hyper=hyper, **others)


# what is called with two buffers of forty numbers, and which operands overlap
OVERLAPS = {
    "written twice": (lambda x, y: ops.displace([x, x], [y, y], [y, y], 0.5), "out out"),
    "two parts": (lambda x, y: ops.saliency([x[:30], x[20:]], [y[:30], y[20:]]), "out out"),
    "shifted": (lambda x, y: ops.displace(y[1:], y[:-1], x[1:], 0.5), "out theta"),
    "shifted the other way": (lambda x, y: ops.displace(y[:-1], x[1:], y[1:], 0.5), "out d"),
    "at another place": (
        lambda x, y: ops.extrapolate([x[:20], x[20:]], [x[20:], x[:20]], [y[:20], y[20:]], 2.0),
        "theta",
    ),
    "a part of it": (lambda x, y: ops.regularize([x[:10], y], [x[20:30], x], l2=0.5), "grad theta"),
    "both are written": (lambda x, y: ops.project(x, x, DOTS), "a b"),
    "the moments": (lambda x, y: update(x[:20], x[20:], None, y[:20], y[:20]), "moment1 moment2"),
    "weights and moments": (lambda x, y: update(x[:20], y[:20], None, x[:20], y[20:]), "theta moment1"),
    "wide moments": (lambda x, y: update(x.bfloat16(), y.view(torch.bfloat16)[:40], None, y), "a moment1"),
    "the mask": (lambda x, y: update(x[:20], y[:20], None, y[20:], mask=x.view(torch.bool)[:20]), "theta mask"),
    "other strides": (
        lambda x, y: ops.displace(x[:36].view(6, 6), x[:36].view(6, 6).t(), y[:36].view(6, 6), 0.5),
        "out theta",
    ),
    "with gaps": (lambda x, y: ops.displace(x[2::2], x[:-2:2], y[2::2], 0.5), "out theta"),
}


@every_backend
@pytest.mark.parametrize("case", OVERLAPS)
def test_what_overlaps_is_refused_and_stays_as_it_was(served, case):
    call, names = OVERLAPS[case]
    x, y = torch.arange(1.0, 41.0), torch.arange(1.0, 41.0)
    with pytest.raises(
        fastlur.ArgumentError, match="overlap in memory, and one of them is written; pass a clone"
    ) as error:
        call(x, y)
    assert all(f"{name}[" in str(error.value) for name in names.split())
    assert torch.equal(x, torch.arange(1.0, 41.0)) and torch.equal(y, x)


@every_backend
def test_a_scalar_that_is_part_of_what_is_written_is_refused(served):
    """On a GPU, and over several pieces, it would change while it is used."""
    x = torch.arange(1.0, 41.0, dtype=torch.float64)
    if served == "extension":  # reads its scalars before it writes
        ops.displace(x, x, x.clone(), x[3])
        assert x.tolist() == [-3.0 * k for k in range(1, 41)]
        return
    with pytest.raises(fastlur.ArgumentError, match=r"scalar\[0\]"):
        ops.displace(x, x, x.clone(), x[3])
    assert x[3] == 4


@every_backend
def test_what_is_only_read_may_be_the_same(served):
    x, y = torch.arange(1.0, 41.0), torch.zeros(40)
    dots, _ = ops.grad_dot([x, x[1:], x[:-1]], [x, x[:-1], x[:-1]])
    assert dots.tolist()[0] == 2 * float(x @ x) - 1600 + float(x[1:] @ x[:-1])
    ops.displace(y, x, x, 0.5)
    assert torch.equal(y, x / 2)
    ops.displace([y[:39], y[39:]], [x[1:], x[:1]], [x[:-1], x[1:2]], 1.0)
    assert y.tolist() == [1.0] * 39 + [-1.0]


@every_backend
@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x[::2], lambda x: x.view(4, 10).t()], ids=["flat", "gaps", "t"])
def test_what_is_written_may_be_read_at_its_own_place(served, lay):
    x, y, z = (lay(torch.arange(1.0, 41.0)) for _ in range(3))
    ops.displace(x, x, y, 0.5)
    assert torch.equal(x, y / 2)
    ops.displace(x, y, x, 2.0)
    assert torch.equal(x, torch.zeros_like(y))
    ops.displace(z, z, z, 0.5)
    ops.saliency(z, z, z)
    assert torch.equal(z, (y / 2) ** 2)
    ops.regularize(y, y, y, l2=0.5, prox=2.0)
    torch.testing.assert_close(y, 6 * z.sqrt() / 2)


@every_backend
def test_elements_between_those_of_another_tensor_are_no_overlap(served):
    matrix = torch.arange(12.0).view(4, 3).contiguous()
    columns, before = [matrix[:, i] for i in range(3)], matrix.clone()
    ops.displace(columns, columns, [torch.ones(4)] * 3, 1.0)
    assert torch.equal(matrix, before - 1)
    ops.displace(matrix[:, 0], matrix[:, 1], matrix[:, 2], 1.0)
    assert torch.equal(matrix[:, 0], -torch.ones(4))


@every_backend
@pytest.mark.parametrize("make", [lambda: torch.zeros(1).expand(4), lambda: torch.zeros(6).unfold(0, 3, 1)[0:4:2]])
def test_one_place_for_several_elements_can_be_read_but_not_written(served, make):
    theta = torch.ones(make().shape)
    with pytest.raises(fastlur.ArgumentError, match=r"out\[0\] has several elements in one place; write to a clone"):
        ops.displace(make(), theta, theta, 0.5)
    ops.displace(theta, theta, make(), 0.5)
    assert torch.equal(theta, torch.ones_like(theta))


@every_backend
@pytest.mark.parametrize("name", ["torch.ops", "of many"])
def test_the_registered_operation_refuses_overlaps_too(served, name):
    x, alpha = torch.ones(40), torch.ones((), dtype=torch.float64)
    lists = [[x, x], [x[1:], x]] if name == "of many" else [[x[1:]], [x[:-1]]]
    with pytest.raises(fastlur.ArgumentError, match=r"overlap|shape"):
        torch.ops.fastlur.displace(lists[0], lists[1], [y.clone() for y in lists[0]], alpha, None)


def test_the_compiled_operation_refuses_overlaps_by_itself():
    if reason := _extension.missing("cpu"):
        pytest.skip(reason)
    x, y, alpha = torch.ones(40), torch.ones(40), torch.ones((), dtype=torch.float64)
    for out, theta in (([x, x], [y, y]), ([x[1:]], [x[:-1]]), ([x[:20], x[20:]], [x[20:], x[:20]]), ([x, y], [y, x])):
        with pytest.raises(RuntimeError, match="overlap in memory"):
            torch.ops.fastlur_ext.displace(out, theta, [z.clone() for z in theta], alpha, None)
    assert torch.equal(x, torch.ones(40))
    several = [x[10 * i : 10 * i + 10] for i in (2, 0, 3, 1)]
    torch.ops.fastlur_ext.displace(several, several, [y[:10], y[5:15], y[:10], y[:10]], alpha, None)
    assert torch.equal(x, torch.zeros(40))


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "mixed axes": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "a slice of it": lambda x: torch.stack([x, x]).permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)[1],
}


def drawn(lay) -> list[list[Tensor]]:
    """The eight lists of `every_operation`, a place with the layout between two that are as usual."""
    random = torch.Generator().manual_seed(1)
    lists = []
    for which in range(8):
        values = [torch.randn(shape, generator=random) for shape in ((5,), (3, 4, 5, 6), (2, 2))]
        values = [x.abs() + 0.1 for x in values] if which in (4, 6) else values
        lists.append([values[0], lay(values[1]), values[2]])
    return lists


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_the_elements_in_memory_makes_no_difference(served, layout):
    lists, plain = drawn(LAYOUTS[layout]), drawn(lambda x: x)
    assert not lists[0][1].is_contiguous()
    strides = [x.stride() for each in lists for x in each]
    values = [cases.every_operation(each, cases.numbers()) for each in (lists, plain)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
    assert strides == [x.stride() for each in lists for x in each]
    for found, expected in zip(lists, plain, strict=True):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_tensors_of_one_layout_reach_a_backend_as_flat_ones(layout):
    """No copies: the backend is handed the very memory, row by row, the mask too."""
    theta, a, *_ = drawn(LAYOUTS[layout])
    mask = [x > 0 for x in a]
    given = []

    def look(t, x, *others):
        given.extend((*t, *x, *others[-3]))

    with backends.backend("torch"), mock.patch.object(reference, "meta_update", look):
        update(theta, a, None, drawn(LAYOUTS[layout])[2], mask=mask)
    assert all(x.is_contiguous() for x in given)
    assert [x.data_ptr() for x in given] == [x.data_ptr() for x in (*theta, *a, *mask)]
    assert given[1].shape == (360,) and given[0] is theta[0]


@every_backend
def test_layouts_that_differ_are_brought_together(served):
    """One operand of another layout, with gaps or without: the numbers of contiguous ones."""
    lays = [*LAYOUTS.values(), lambda x: torch.stack([x, x], -1)[..., 0]]
    plain = drawn(lambda x: x)
    cases.every_operation(plain, cases.numbers())
    for other in range(8):
        lists = drawn(LAYOUTS["channels_last"])
        lists[other][1] = lays[other % len(lays)](lists[other][1].contiguous())
        cases.every_operation(lists, cases.numbers())
        for found, expected in zip(lists, plain, strict=True):
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@every_backend
def test_autograd_learns_what_was_written_through_a_flat_view(served):
    theta = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(theta.clone(memory_format=torch.preserve_format))
    product = (weight * theta).sum()
    ops.displace(weight, weight, theta, 0.5)
    assert weight.is_leaf and weight.grad is None
    torch.testing.assert_close(weight.detach(), theta / 2)
    ops.displace(theta, theta, theta, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_sums_of_channels_last_tensors_are_those_of_flat_ones():
    x = torch.rand(64, 64, 9, 8)
    with backends.backend("torch"):
        flat, _ = ops.grad_dot(x.flatten(), x.flatten())
        laid, _ = ops.grad_dot(*[x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)] * 2)
    truth = float(x.double().square().sum())
    assert all(abs(float(each[0]) - truth) <= 1e-6 * truth for each in (flat, laid))
    assert same([ops.grad_dot(x, x)[0]], [ops.grad_dot(x.flatten(), x.flatten())[0]])
