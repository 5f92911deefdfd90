"""The cases that test_kernels_gpu.py asks of a GPU, here of every backend on whatever device there is."""

import backend_cases as cases
import pytest
import torch
from kernel_cases import CUDA, UNEVEN

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=cases.BACKENDS, autouse=True)
def served(request):
    with cases.through(request.param):
        yield request.param


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sizes", [[1025], UNEVEN], ids=["flat", "list"])
def test_every_operation_against_float64(sizes, dtype, offset):
    cases.check_against_truth(sizes, dtype, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_nothing_moves_when_a_loss_is_not_finite(dtype):
    cases.check_flag([63, 0, 1025], dtype)


def test_sums_have_one_bit_pattern():
    cases.check_repetitions([5000, 63], times=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_stored_rounded_to_nearest(dtype, served):
    if dtype == torch.bfloat16 and served == "triton" and not CUDA:
        pytest.skip("the interpreter cuts bfloat16 off")
    cases.check_rounding(UNEVEN, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_short_number_is_read_as_what_it_is(dtype, served):
    wrong = dtype == torch.bfloat16 and served == "triton" and not CUDA  # the interpreter reads subnormal ones wrongly
    cases.check_short_numbers(dtype, subnormal=not wrong)


@pytest.mark.parametrize("others", [[], [7]], ids=["flat", "list"])
def test_the_last_element_counts(others):
    cases.check_huge(4099, others)
    cases.check_huge_update(4099)
    cases.check_huge_adamw(4099)
    cases.check_huge_after(4099)


def test_threshold():
    cases.check_threshold()
