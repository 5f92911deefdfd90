"""Each backend that serves CUDA, through the public operations, against float64; only a GPU can show this."""

import pytest
import torch
from kernel_cases import CUDA, DEVICE, LARGE, SIZES, clones, draw, eight, same, scalars

from fastlur import backends, ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


@pytest.fixture(params=["torch", "triton", "extension"])
def backend(request):
    reason = backends.unavailable(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    with backends.backend(request.param):
        yield request.param


def everything(lists, numbers):
    """Every public operation once; returns what they return."""
    theta, a, u, first, second, theta0, fisher, out = lists
    control, hyper, loss, alpha, eta, conflict = numbers
    dots, each = ops.grad_dot(a, u)
    ops.displace(out, theta, a, alpha, dots[1])
    ops.project(a, u, conflict, "symmetric")
    value = ops.regularize(a, theta, theta0, fisher, l2=0.1, l1=0.1, prox=0.1)
    ops.step_control(control, dots, loss, hyper)
    ops.meta_update(theta, a, u, first, second, control=control, hyper=hyper, theta0=theta0, fisher=fisher)
    ops.extrapolate(theta, theta0, u, alpha, eta)
    ops.saliency(out, a, theta)
    return [dots, each, value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[1], [LARGE], [*SIZES, 4096, 5], [63] * 62], ids=["one", "large", "uneven", "many"])
def test_every_operation_is_that_of_float64(backend, sizes, dtype):
    lists = eight(sizes, dtype)
    wide = [[x.double() for x in each] for each in lists]
    found = everything(lists, scalars())
    with backends.backend("torch"):
        truth = everything(wide, scalars())
    # a chain of eight operations, each storing in the dtype: some roundings of it add up
    rough = 32 * torch.finfo(dtype).eps
    for x, y in zip(
        [*found, *(x for each in lists for x in each)], [*truth, *(x for e in wide for x in e)], strict=True
    ):
        torch.testing.assert_close(x.double(), y, rtol=rough, atol=rough)


def test_misaligned_and_strided_vectors(backend):
    base = torch.randn(2 * 5000 + 3, device=DEVICE)
    for view in (base[1:5001], base[3:-1:2]):
        out = torch.full_like(view, torch.nan)
        ops.displace(out, view, view, 0.5)
        torch.testing.assert_close(out, view * 0.5, rtol=0, atol=0)
        total = ops.grad_dot(view, view)[0]
        assert float(total[0]) == pytest.approx(float(view.double().square().sum()), rel=1e-6)


def test_a_thousand_repetitions_give_one_bit_pattern(backend):
    a, b = draw([1, 1025, 500_009], seed=0), draw([1, 1025, 500_009], seed=1)
    first = ops.grad_dot(a, b)
    for _ in range(1000):
        assert same(ops.grad_dot(a, b), first)


def test_a_captured_step_does_what_the_step_does(backend):
    lists, numbers = eight([100_003]), scalars()
    alone, other = [clones(each) for each in lists], scalars()

    def step(lists, numbers):
        theta, a, u, first, second, theta0, fisher, out = lists
        control, hyper, loss, alpha, *_ = numbers
        ops.displace(out, theta, a, alpha)
        dots, _ = ops.grad_dot(a, u)
        ops.step_control(control, dots, loss, hyper)
        ops.meta_update(theta, a, u, first, second, control=control, hyper=hyper, theta0=theta0, fisher=fisher)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(lists, numbers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(lists, numbers)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        step(alone, other)
    assert same(numbers, other)
    assert all(same(mine, theirs) for mine, theirs in zip(lists, alone, strict=True))


def test_an_operation_never_waits_for_the_device(backend):
    lists, numbers = eight([1025, 63]), scalars()
    everything(lists, numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(lists, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
