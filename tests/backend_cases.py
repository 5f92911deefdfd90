"""Every backend through `fastlur.ops`, on a GPU where there is one; without one the kernels run in the interpreter.

The cases are functions of the sizes, so that what test_kernels_gpu.py asks of billions of elements on a GPU has been
asked of few on a CPU by test_backends.py.
"""

import os
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from kernel_cases import DEVICE, clones, double, draw, full_of_nan, interpreted, number, same

from fastlur import backends, ops, reference
from fastlur.operands import control_scalars, hyper_parameters

BACKENDS = ("torch", "triton", "extension")
GUARD = 16  # elements on either side of a tensor that must not change


@contextmanager
def through(name):
    """Inside, this backend serves; a test is skipped where it is not there."""
    if name == "triton" and DEVICE == "cpu":
        with interpreted():
            yield
        return
    reason = backends.unavailable(name, DEVICE)
    if reason is not None:
        if name == "extension" and os.environ.get("FASTLUR_EXT") == "1":
            pytest.fail(f"FASTLUR_EXT=1, but {reason}")
        pytest.skip(f"{name}: {reason}")
    with backends.backend(name):
        yield


def numbers():
    """control, hyper, two losses, α and the dots of two vectors in conflict."""
    named = {"lr": 0.1, "momentum": 0.9, "beta2": 0.99, "weight_decay": 0.1, "l1": 0.1, "prox": 0.1, "clip": 1.0}
    conflict = torch.tensor([-3.0, 2.0, 7.0], dtype=torch.float64, device=DEVICE)
    losses = torch.ones(2, dtype=torch.float64, device=DEVICE)
    return control_scalars(DEVICE), hyper_parameters(DEVICE, **named), losses, number(0.1), conflict


def vector_step(lists, scalars):
    """The displaced point, the dots, the decision and the update: the vector work of one step."""
    theta, a, u, first, second, theta0, fisher, out = lists
    control, hyper, losses, alpha, _ = scalars
    ops.displace(out, theta, a, alpha)
    dots, _ = ops.grad_dot(a, u)
    ops.step_control(control, dots, losses, hyper)
    ops.meta_update(theta, a, u, first, second, control=control, hyper=hyper, theta0=theta0, fisher=fisher)


def every_operation(lists, scalars):
    """Each once, on results of the one before; returns the penalty's value."""
    theta, a, u, _, _, theta0, fisher, out = lists
    vector_step(lists, scalars)
    ops.project(a, u, scalars[-1], "symmetric")
    value = ops.regularize(a, theta, theta0, fisher, l2=0.1, l1=0.2, prox=0.3)
    ops.extrapolate(theta, theta0, u, scalars[3], 0.5)
    ops.saliency(out, a, theta)
    return value


def guarded(sizes, dtype, offset):
    """The eight lists of `every_operation`, each as slices of a buffer of NaN, `offset` elements off a line."""
    buffers, lists = [], []
    for seed in range(8):
        positive = seed in (4, 6)
        values = [x.abs() + 0.1 if positive else x for x in draw(sizes, dtype, seed)]
        room = [-(-size // GUARD) * GUARD + 2 * GUARD for size in sizes]
        buffer = torch.full((sum(room) + 2 * GUARD,), torch.nan, dtype=dtype, device=DEVICE)
        parts, start = [], GUARD + offset
        for value, size in zip(values, room, strict=True):
            parts.append(buffer[start : start + value.numel()])
            parts[-1].copy_(value)
            start += size
        buffers.append(buffer)
        lists.append(parts)
    return buffers, lists


def check_against_truth(sizes, dtype, offset):
    """Everything that every operation writes, against float64, and nothing beside it."""
    buffers, lists = guarded(sizes, dtype, offset)
    exact, mine, theirs = [double(each) for each in lists], numbers(), numbers()
    with mock.patch.object(backends, "resolve", return_value=("torch", reference)):  # whoever serves now
        expected = every_operation(exact, theirs)
    value = every_operation(lists, mine)
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    roundings = 8 * torch.finfo(dtype).eps + 256 * wide  # each operation takes the rounded results of the one before
    for found, truth in zip(lists, exact, strict=True):
        for x, y in zip(found, truth, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=4 * roundings, atol=16 * roundings)
    torch.testing.assert_close(mine[0], theirs[0], rtol=4 * roundings, atol=0)
    torch.testing.assert_close(value, expected, rtol=8 * roundings, atol=0)
    for buffer in buffers:
        assert int(buffer.isnan().sum()) == buffer.numel() - sum(sizes)


def check_flag(sizes, dtype):
    """A loss that is not finite: nothing moves."""
    _, lists = guarded(sizes, dtype, 0)
    kept = [clones(each) for each in lists[:-1]]
    control, hyper, losses, *rest = numbers()
    losses[1] = torch.nan
    vector_step(lists, (control, hyper, losses, *rest))
    assert control[:2].tolist() == [0, 0]
    assert all(same(now, was) for now, was in zip(lists, kept, strict=False))


def check_repetitions(sizes, times):
    """One bit pattern of the sums."""
    a, b = draw(sizes, seed=0), draw(sizes, seed=1)
    first, value = ops.grad_dot(a, b), ops.regularize(clones(a), b, l2=0.1, l1=0.2)
    for _ in range(times):
        assert same(ops.grad_dot(a, b), first)
        assert same([ops.regularize(clones(a), b, l2=0.1, l1=0.2)], [value])


def check_rounding(sizes, dtype):
    """α is a power of two, so that the float32 result is the same fused or not, and so must its rounding be."""
    theta, d = draw(sizes, dtype, 0), draw(sizes, dtype, 1)
    out = full_of_nan(theta)
    ops.displace(out, theta, d, 0.5)
    assert same(out, [(t.float() - 0.5 * v.float()).to(dtype) for t, v in zip(theta, d, strict=True)])


def check_short_numbers(dtype, subnormal):
    """Every number of sixteen bits is read as what it is, and what it is read as is stored."""
    every = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    if not subnormal:
        every = every[(every == 0) | (every.abs() >= torch.finfo(dtype).tiny)]
    out = full_of_nan([every])
    ops.saliency(out, [every])
    assert same(out, [every.abs()])
    moments = torch.zeros(len(every), device=DEVICE)
    zero = torch.zeros_like(every)
    ops.meta_update(zero, every, None, moments, control=control_scalars(DEVICE), hyper=hyper_parameters(DEVICE))
    assert torch.equal(moments, every.float())


def filled(value, size):
    return torch.full((size,), value, dtype=torch.bfloat16, device=DEVICE)


def check_huge(size, others, rel=0):
    """The last element of a tensor so large that 32-bit offsets would wrap around is read and written."""
    theta, d = ([filled(value, n) for n in (size, *others)] for value in (1.0, 0.5))
    d[0][-1] = 8.0
    total, each = ops.grad_dot(theta, d)
    assert each[0].tolist() == pytest.approx([size / 2 + 7.5, size, size / 4 + 63.75], rel=rel, abs=0)
    assert float(total[1]) == pytest.approx(size + sum(others), rel=rel, abs=0)
    ops.project(theta, d, torch.tensor([-1.0, 2.0, 1.0], dtype=torch.float64, device=DEVICE), "one_sided")
    assert float(d[0][-1]) == 8.5 and int((d[0] == 1.0).sum()) == size - 1
    out = full_of_nan(theta)
    for v in d:
        v.fill_(0.5)
    d[0][-1] = 8.0
    ops.displace(out, theta, d, 2.0)
    assert float(out[0][-1]) == -15.0
    assert int((out[0] == 0).sum()) == size - 1
    assert all(bool((o == 0).all()) for o in out[1:])


def check_huge_update(size):
    theta, a, moment = ([filled(value, size)] for value in (1.0, 0.5, 0.0))
    a[0][-1] = -2.0
    ops.meta_update(theta, a, None, moment, control=control_scalars(DEVICE), hyper=hyper_parameters(DEVICE, lr=0.5))
    assert same(moment, a)
    assert float(theta[0][-1]) == 2.0 and int((theta[0] == 0.75).sum()) == size - 1
    value = ops.regularize(a, theta, l2=2.0)
    assert float(value) == pytest.approx((size - 1) * 0.75**2 + 4, rel=1e-6)
    assert float(a[0][-1]) == 2.0 and int((a[0] == 2.0).sum()) == size


def check_huge_adamw(size):
    """The first step of AdamW is lr in the direction of the gradient's sign, for the last element too."""
    theta, a, first, second = ([filled(value, size)] for value in (1.0, 0.5, 0.0, 0.0))
    a[0][-1] = -2.0
    hyper = hyper_parameters(DEVICE, lr=0.5, momentum=0.5, beta2=0.75)
    control = control_scalars(DEVICE)
    ops.step_control(control, torch.ones(3, dtype=torch.float64, device=DEVICE), number(1.0), hyper)
    ops.meta_update(theta, a, None, first, second, control=control, hyper=hyper)
    assert float(theta[0][-1]) == 1.5 and int((theta[0] == 0.5).sum()) == size - 1
    assert float(first[0][-1]) == -1.0 and int((first[0] == 0.25).sum()) == size - 1
    assert float(second[0][-1]) == 1.0 and int((second[0] == 0.0625).sum()) == size - 1


def check_huge_after(size):
    """What is done once after a run: extrapolation, saliency, threshold."""
    theta, theta0, out = ([filled(value, size)] for value in (0.0, 1.0, 0.0))
    memorised = [filled(0.5, size)]
    memorised[0][-1] = 4.0
    ops.extrapolate(theta, theta0, memorised, 2.0, 1.0)
    assert float(theta[0][-1]) == -5.0 and int((theta[0] == 2.0).sum()) == size - 1
    ops.saliency(out, theta, memorised)
    assert float(out[0][-1]) == 20.0 and int((out[0] == 1.0).sum()) == size - 1
    assert float(ops.threshold(out, 0.5)) == 1.0
    assert float(ops.threshold(out, 1.0)) == 20.0


def check_threshold():
    """Also where torch is told to use nothing that has no deterministic form."""
    scores = draw([1025, 63], seed=3)
    every = torch.cat(scores).double().sort().values
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            assert float(ops.threshold(scores, 0.5)) == float(every[543])
    finally:
        torch.use_deterministic_algorithms(before)
