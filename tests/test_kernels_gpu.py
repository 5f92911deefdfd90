"""What only a GPU can show of every backend, through `fastlur.ops`: huge tensors, captured graphs, no wait for it.

The cases themselves are those of backend_cases.py. At the end what concerns the Triton kernels alone: launches as the
profiler counts them, and their tables.
"""

import backend_cases as cases
import pytest
import torch
from kernel_cases import CUDA, DEVICE, clones, draw, eight, kernels, modules, number, same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]

HUGE = 2**31 + 4099  # elements: 32-bit offsets would wrap around
UNEVEN = [1, 0, 63, 4096, 1025, 100_003, 5]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
layouts = pytest.mark.parametrize("sizes", [[100_003], UNEVEN], ids=["flat", "list"])


@pytest.fixture(params=cases.BACKENDS)
def served(request):
    with cases.through(request.param):
        yield request.param


@layouts
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_operation_against_float64(served, sizes, dtype, offset):
    cases.check_against_truth(sizes, dtype, offset)


@pytest.mark.parametrize("others", [[], [7]], ids=["flat", "list"])
def test_more_than_two_to_the_thirty_first_elements(served, others):
    # torch adds up float32 within a piece, which rounds; the others lose nothing here
    cases.check_huge(HUGE, others, rel=1e-6 if served == "torch" else 0)


def test_update_of_more_than_two_to_the_thirty_first_elements(served):
    cases.check_huge_update(HUGE)


@pytest.mark.parametrize(
    ("check", "vectors"), [(cases.check_huge_adamw, 6), (cases.check_huge_after, 12)], ids=["adamw", "after"]
)
def test_the_rest_of_more_than_two_to_the_thirty_first_elements(served, check, vectors):
    """`vectors`, of two bytes an element, must fit at once, with those that comparing and sorting make."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 2 * vectors * HUGE:
        pytest.skip(f"needs {2 * vectors * HUGE / 1e9:.0f} GB of free memory")
    check(HUGE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_stored_rounded_to_nearest(served, dtype):
    cases.check_rounding(UNEVEN, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_short_number_is_read_as_what_it_is(served, dtype):
    cases.check_short_numbers(dtype, subnormal=True)


def test_repetitions_give_one_bit_pattern(served):
    cases.check_repetitions([*UNEVEN, 5_000_011], times=50 if served == "torch" else 1000)


@layouts
def test_a_step_captured_in_a_graph_does_what_the_step_does(served, sizes):
    lists, scalars = eight(sizes), cases.numbers()
    alone, other = [clones(each) for each in lists], cases.numbers()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cases.vector_step(lists, scalars)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cases.vector_step(lists, scalars)
    # tables that a graph reads outlive any number of others
    for seed in range(modules["table"].KEPT + 5):
        each = draw([3, 4], seed=seed)
        kernels.saliency(each, each, None)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        cases.vector_step(alone, other)
    assert float(scalars[0][1]) == 4
    assert same(scalars, other)
    assert all(same(mine, theirs) for mine, theirs in zip(lists, alone, strict=True))


@layouts
def test_a_step_never_waits_for_the_device(served, sizes):
    lists, scalars = eight(sizes), cases.numbers()
    cases.every_operation(lists, scalars)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cases.every_operation(lists, scalars)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_moves_when_a_loss_is_not_finite(served):
    cases.check_flag(UNEVEN, torch.float32)


def test_a_threshold_where_determinism_is_asked_for(served):
    cases.check_threshold()


def test_tensors_of_another_device_are_refused():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    here, there = torch.ones(5, device="cuda:0"), torch.tensor(1.0, dtype=torch.float64, device="cuda:1")
    with cases.through("extension"), pytest.raises(RuntimeError, match="device"):
        torch.ops.fastlur.displace([here], [here], [here], there, None)


def test_a_device_that_is_not_the_current_one_is_served(served):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    theta, d = torch.ones(2, 5000, device="cuda:1")
    cases.ops.displace(theta, theta, d, 0.5)
    assert torch.cuda.current_device() == 0
    assert bool((theta == 0.5).all())


def test_new_lists_are_refused_while_a_graph_is_captured():
    lists, alpha, counter = [draw([5, 6], seed=seed) for seed in range(3)], number(0.1), torch.zeros(1, device=DEVICE)

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            counter.add_(1)
            kernels.displace(*lists, alpha)

    with pytest.raises(RuntimeError, match="before capturing"):
        capture()


@pytest.mark.parametrize("sizes", [[5000], [63] * 62], ids=["flat", "list"])
def test_a_step_is_five_launches_and_no_copy(sizes):
    """As the profiler counts everything that the device does, from the displacement to the update, on one dtype.

    Not in it: how the losses come to lie side by side, which is torch's, and a second displacement or sum, which a rule
    may have. test_kernels_lists.py counts in the interpreter, two dtypes too.
    """
    from torch.profiler import ProfilerActivity, profile

    lists, scalars = eight(sizes), cases.numbers()
    with cases.through("triton"):
        cases.vector_step(lists, scalars)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run, cases.through("triton"):
        cases.vector_step(lists, scalars)
        torch.cuda.synchronize()
    events = [event for event in run.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in events if "sync" not in event.name.lower()]
    assert names == ["displace_kernel", "dot_kernel", "finish_kernel", "control_kernel", "update_kernel"]
