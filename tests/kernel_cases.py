"""What the tests of the kernels share: where they run, their data, and how near is near enough.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported. Its known faults,
all of bfloat16: float32 is cut off, not rounded, when it is stored (`close` allows for that and only there), arithmetic
without a cast to float32 is wrong (the kernels always cast), and subnormal numbers are read wrongly, most of them as 0
(`backend_cases.check_short_numbers` leaves them out). test_kernels_gpu.py holds the compiled kernels to all of it.
"""

import importlib
import os
from unittest import mock

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

kernels, backends = (importlib.import_module(f"fastlur.{name}") for name in ("kernels", "backends"))
NAMES = "control displace dot extrapolate launch layout project reduction regularize saliency table update"
modules = {name: importlib.import_module(f"fastlur.kernels.{name}") for name in NAMES.split()}
if not CUDA:
    assert "Interpreted" in type(modules["displace"].displace_kernel).__name__, "fastlur.kernels was imported too early"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [0, 1, 63, 1023, 1025]
LARGE = 2**20 + 3
UNEVEN = [1, 0, 63, 4096, 1025, 1023, 5, 9000]


def interpreted():
    """Inside, the interpreter serves CPU tensors: it is no backend, but it runs the code of one."""
    return mock.patch.object(backends, "resolve", return_value=("triton", kernels))


def number(value):
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


def draw(sizes, dtype=torch.float32, seed=0, contiguous=True):
    """One tensor a size, normally distributed; `dtype` may be a list, one a size."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = dtype if isinstance(dtype, list) else [dtype] * len(sizes)
    drawn = []
    for size, kind in zip(sizes, dtypes, strict=True):
        wide = torch.randn(size if contiguous else 2 * size, generator=generator).to(DEVICE, kind)
        drawn.append(wide if contiguous else wide[::2])
    return drawn


def full_of_nan(like):
    return [torch.empty_like(x).fill_(float("nan")) for x in like]


def eight(sizes, dtype=torch.float32):
    """θ, a, u, two moments, θ₀, Fisher weights and one list more."""
    lists = [draw(sizes, dtype, seed) for seed in range(8)]
    for x in (*lists[4], *lists[6]):
        x.abs_()
    return lists


def scalars():
    """control, hyper, a loss, α, η and the dots of two vectors in conflict."""
    control = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64, device=DEVICE)
    hyper = torch.tensor([0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, 1.0], dtype=torch.float64, device=DEVICE)
    conflict = torch.tensor([-3.0, 2.0, 7.0], dtype=torch.float64, device=DEVICE)
    return control, hyper, number(1.0), number(0.1), number(0.5), conflict


def operate(lists, numbers=None):
    """Every operation once."""
    theta, a, u, first, second, theta0, fisher, out = lists
    control, hyper, loss, alpha, eta, conflict = numbers or scalars()
    dots, _ = kernels.grad_dot(a, u)
    kernels.displace(out, theta, a, alpha, dots[1])
    kernels.project(a, u, conflict, "symmetric")
    kernels.regularize(a, theta, theta0, fisher, hyper)
    kernels.step_control(control, dots, loss, hyper)
    kernels.meta_update(theta, a, u, first, second, theta0, fisher, None, control, hyper)
    kernels.extrapolate(theta, theta0, u, alpha, eta)
    kernels.saliency(out, a, theta)


def double(tensors):
    """Copies in float64."""
    return None if tensors is None else [x.to(torch.float64, copy=True) for x in tensors]


def clones(tensors):
    """Copies with the strides of the originals."""
    if tensors is None:
        return None
    copies = [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return copies


def same(left, right):
    """Equal to the bit, NaN included."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return len(left) == len(right) and all(
        torch.equal(x.contiguous().view(kinds[x.element_size()]), y.contiguous().view(kinds[y.element_size()]))
        for x, y in zip(left, right, strict=True)
    )


def close(actual, truth, scales, steps):
    """Every element within `steps` rounding errors of `scales`, the size of the terms it was computed from.

    A rounding error is half an epsilon, of float32 (float64 for float64). To that comes storing the result: half an
    epsilon of its dtype, or a whole one where the interpreter cuts off.
    """
    assert len(actual) == len(truth)
    for got, want, scale in zip(actual, truth, scales, strict=True):
        kind = torch.finfo(got.dtype)
        computed = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps / 2
        stored = kind.eps if got.dtype == torch.bfloat16 and not CUDA else kind.eps / 2
        bound = steps * computed * scale.double() * (1 + stored) + stored * want.abs() + kind.tiny * kind.eps
        error = (got.double() - want).abs()
        assert bool((error <= bound).all()), (
            f"{got.dtype}, {got.numel()}: {(error / bound).nan_to_num(1e9).max()} bounds"
        )
