"""A thousand repetitions of every operation leave one bit pattern, whoever computes and with however many threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlur import _extension, reference

TIMES = 1000
SMALL = (1, 63, 0, 1025)
PIECES = (2 * reference.PIECE + 77, 3)  # three pieces for torch, three spans for the extension, and a tiny tensor
OPERATIONS = {
    "grad_dot": "a b",
    "displace": "out a b alpha norm2",
    "project": "a b dots kind",
    "regularize": "a b theta0 fisher hyper",
    "step_control": "control dots losses hyper",
    "meta_update": "theta a b m v theta0 fisher mask control hyper",
    "extrapolate": "theta a b alpha eta",
    "saliency": "out a b",
    "threshold": "a sparsity",
}


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def extension():
    if reason := _extension.load():
        pytest.skip(reason)
    return _extension


def operands(sizes) -> dict:
    random = torch.Generator().manual_seed(7)
    named = {
        name: [torch.randn(size, generator=random) for size in sizes]
        for name in ("out", "a", "b", "theta", "theta0", "fisher", "m", "v", "mask")
    }
    named |= {name: [x.abs() for x in named[name]] for name in ("fisher", "v")}
    numbers = {"alpha": 0.3, "eta": 0.7, "norm2": 3.0, "dots": [-3.0, 2.0, 7.0], "losses": [1.0, 0.3, 0.7]}
    numbers |= {"control": [1.0, 3.0, 0.7], "hyper": [0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, 0.7]}
    scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    others = {"mask": [x > 0 for x in named["mask"]], "kind": "symmetric", "sparsity": 0.3}
    return named | scalars | others


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value for x in tensors(each)] if isinstance(value, list | tuple) else []


def patterns(operation, module, sizes=SMALL, times=TIMES) -> set[bytes]:
    """The different bit patterns of all that is returned or written, over so many calls from the same start."""
    given, function = operands(sizes), getattr(module, operation)
    arguments = [given[name] for name in OPERATIONS[operation].split()]
    held = tensors(arguments)
    start, seen = [x.clone() for x in held], set()
    for _ in range(times):
        for tensor, value in zip(held, start, strict=True):
            tensor.copy_(value)
        returned = tensors(function(*arguments))
        seen.add(b"".join(x.numpy().tobytes() for x in (*held, *returned)))
    return seen


@pytest.mark.parametrize("operation", OPERATIONS)
def test_plain_torch(operation):
    assert len(patterns(operation, reference)) == 1


def test_plain_torch_over_several_pieces():
    assert len(patterns("grad_dot", reference, PIECES)) == 1
    assert len(patterns("regularize", reference, PIECES, times=100)) == 1


@pytest.mark.parametrize("lay", [lambda x: x, lambda x: x.view(-1, 257).t(), lambda x: x.view(-1, 2)[:, 0]])
def test_plain_torch_with_any_number_of_threads(lay):
    """Sums are cut by sizes alone, also of tensors with gaps in memory or with their elements in another order."""
    random = torch.Generator().manual_seed(1)
    given = [lay(torch.randn(514 * 1000, generator=random)) for _ in range(4)]
    hyper = torch.tensor([0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, 0.7], dtype=torch.float64)
    seen = set()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        a, b, theta0, fisher = ([x.clone(memory_format=torch.preserve_format)] for x in given)
        total, each = reference.grad_dot(a, b)
        value = reference.regularize(a, b, theta0, fisher, hyper)
        seen.add(b"".join(x.contiguous().numpy().tobytes() for x in (total, each, value, *a)))
    assert len(seen) == 1


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"threshold"}))
def test_the_extension_with_any_number_of_threads(operation, extension):
    """csrc/cpu/plan.h: work is cut by sizes alone, so the number of threads does not show in a single bit."""
    seen = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen |= patterns(operation, extension)
        seen |= {b"several spans" + bits for bits in patterns(operation, extension, PIECES, times=10)}
    assert len(seen) == 2


def test_the_extension_over_several_spans_with_any_number_of_threads(extension):
    seen = set()
    for threads, times in ((1, TIMES), (2, 100), (3, 100)):  # on a busy machine threads wait long for each other
        torch.set_num_threads(threads)
        seen |= patterns("grad_dot", extension, PIECES, times)
    assert len(seen) == 1
