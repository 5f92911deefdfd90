"""What only a GPU can show: huge tensors, exact rounding, captured graphs, launches as the profiler counts them."""

import pytest
import torch
from kernel_cases import (
    CUDA,
    DEVICE,
    clones,
    draw,
    eight,
    full_of_nan,
    kernels,
    modules,
    number,
    operate,
    same,
    scalars,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]

HUGE = 2**31 + 4099  # elements: 32-bit offsets would wrap around
UNEVEN = [1, 0, 63, 4096, 1025, 100_003, 5]


def filled(value, size=HUGE):
    return torch.full((size,), value, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("others", [[], [7]], ids=["flat", "list"])
def test_more_than_two_to_the_thirty_first_elements(others):
    theta, d = [filled(1.0)], [filled(0.5)]
    theta += [filled(1.0, size) for size in others]
    d += [filled(0.5, size) for size in others]
    d[0][-1] = 8.0
    total, each = kernels.grad_dot(theta, d)
    assert each[0].tolist() == [HUGE / 2 + 7.5, HUGE, HUGE / 4 + 63.75]
    assert float(total[1]) == HUGE + sum(others)
    kernels.project(theta, d, torch.tensor([-1.0, 2.0, 1.0], dtype=torch.float64, device=DEVICE), "one_sided")
    assert float(d[0][-1]) == 8.5 and int((d[0] == 1.0).sum()) == HUGE - 1
    out = full_of_nan(theta)
    for v in d:
        v.fill_(0.5)
    d[0][-1] = 8.0
    kernels.displace(out, theta, d, number(2.0))
    assert float(out[0][-1]) == -15.0
    assert int((out[0] == 0).sum()) == HUGE - 1
    assert all(bool((o == 0).all()) for o in out[1:])


def test_update_of_more_than_two_to_the_thirty_first_elements():
    theta, a, moment = [filled(1.0)], [filled(0.5)], [filled(0.0)]
    a[0][-1] = -2.0
    control = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
    hyper = torch.tensor([0.5, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64, device=DEVICE)
    kernels.meta_update(theta, a, None, moment, None, None, None, None, control, hyper)
    assert same(moment, a)
    assert float(theta[0][-1]) == 2.0 and int((theta[0] == 0.75).sum()) == HUGE - 1
    value = kernels.regularize(a, theta, None, None, hyper + torch.tensor([0.0] * 4 + [2.0] + [0.0] * 3, device=DEVICE))
    assert float(value) == pytest.approx((HUGE - 1) * 0.75**2 + 4, rel=1e-6)
    assert float(a[0][-1]) == 2.0 and int((a[0] == 2.0).sum()) == HUGE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_stored_rounded_to_nearest(dtype):
    """α is a power of two, so that the float32 result is the same fused or not, and so must its rounding be."""
    theta, d = draw(UNEVEN, dtype, 0), draw(UNEVEN, dtype, 1)
    out = full_of_nan(theta)
    kernels.displace(out, theta, d, number(0.5))
    assert same(out, [(t.float() - 0.5 * v.float()).to(dtype) for t, v in zip(theta, d, strict=True)])


def test_a_thousand_repetitions_give_one_bit_pattern():
    a, b = draw([*UNEVEN, 5_000_011], seed=0), draw([*UNEVEN, 5_000_011], seed=1)
    hyper = scalars()[1]
    first, value = kernels.grad_dot(a, b), kernels.regularize(clones(a), b, None, None, hyper)
    for _ in range(1000):
        assert same(kernels.grad_dot(a, b), first)
        assert same([kernels.regularize(clones(a), b, None, None, hyper)], [value])


def vector_step(lists, numbers):
    """Out and back, the dots, the decision and the update: the vector work of one step."""
    theta, a, u, first, second, theta0, fisher, out = lists
    control, hyper, loss, alpha, *_ = numbers
    kernels.displace(out, theta, a, alpha)
    kernels.displace(out, out, u, alpha)
    dots, _ = kernels.grad_dot(a, u)
    kernels.step_control(control, dots, loss, hyper)
    kernels.meta_update(theta, a, u, first, second, theta0, fisher, None, control, hyper)


@pytest.mark.parametrize("sizes", [[100_003], UNEVEN], ids=["flat", "list"])
def test_a_step_captured_in_a_graph_does_what_the_step_does(sizes):
    lists, numbers = eight(sizes), scalars()
    alone, other = [clones(each) for each in lists], scalars()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        vector_step(lists, numbers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vector_step(lists, numbers)
    # tables that a graph reads outlive any number of others
    for seed in range(modules["table"].KEPT + 5):
        each = draw([3, 4], seed=seed)
        kernels.saliency(each, each, None)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        vector_step(alone, other)
    assert float(numbers[0][1]) == 4
    assert same(numbers, other)
    assert all(same(mine, theirs) for mine, theirs in zip(lists, alone, strict=True))


def test_new_lists_are_refused_while_a_graph_is_captured():
    lists, alpha, counter = [draw([5, 6], seed=seed) for seed in range(3)], number(0.1), torch.zeros(1, device=DEVICE)

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            counter.add_(1)
            kernels.displace(*lists, alpha)

    with pytest.raises(RuntimeError, match="before capturing"):
        capture()


def test_a_step_never_waits_for_the_device():
    lists, numbers = eight(UNEVEN), scalars()
    operate(lists, numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operate(lists, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sizes", [[5000], [63] * 62], ids=["flat", "list"])
def test_a_step_is_six_launches_and_no_copy(sizes):
    from torch.profiler import ProfilerActivity, profile

    lists, numbers = eight(sizes), scalars()
    vector_step(lists, numbers)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        vector_step(lists, numbers)
        torch.cuda.synchronize()
    events = [event for event in run.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in events if "sync" not in event.name.lower()]
    expected = ["displace_kernel"] * 2 + ["dot_kernel", "finish_kernel", "control_kernel", "update_kernel"]
    assert names == expected
