"""Lists of tensors to try the compiled extension with, and how near to the float64 truth it must come."""

import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 63, 1023, 1025]
LARGE = 2**20 + 3  # some dozens of blocks and a tail
GUARD = 64  # elements on either side of an output that must not change


def numbers(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def hyper(lr=0.1, momentum=0.9, beta2=0.99, eps=1e-8, decay=0.0, l1=0.0, prox=0.0, clip=0.0):
    return numbers(lr, momentum, beta2, eps, decay, l1, prox, clip)


def control(ok=1.0, count=3.0, scale=0.75):
    return numbers(ok, count, scale)


class Lists:
    """Lists of random tensors inside guarded memory, so that a stray write is seen."""

    def __init__(self, shapes, dtype, contiguous=True, seed=0):
        self.shapes, self.dtype, self.contiguous = shapes, dtype, contiguous
        self.random = torch.Generator().manual_seed(seed)
        self.held = []  # (memory, what it holds inside the guards, tensor, copy, whether it may be written)

    def new(self, written=False, poisoned=False, positive=False):
        tensors = []
        for shape in self.shapes:
            step = 1 if self.contiguous else 2
            size = torch.Size(shape).numel()
            memory = torch.full((size * step + 2 * GUARD,), 7.0, dtype=self.dtype)
            inside = memory[GUARD : GUARD + size * step].view(*shape, step)[..., 0]
            value = torch.randn(shape, generator=self.random, dtype=torch.float64)
            inside.copy_(torch.nan if poisoned else value.abs() if positive else value)
            tensors.append(inside)
            self.held.append((memory, inside, inside.clone(), written))
        return tensors

    def check(self):
        """Inputs are unchanged, and so is everything around what may be written."""
        for memory, inside, before, written in self.held:
            if not written:
                assert torch.equal(inside, before)
            inside.fill_(7.0)
            assert torch.equal(memory, torch.full_like(memory, 7.0))


def double(tensors):
    """Copies, even of what is float64 already: truth and trial must not share memory."""
    return None if tensors is None else [tensor.to(torch.float64, copy=True) for tensor in tensors]


def assert_close(actual, truth, scale, roundings):
    """Within so many roundings of the dtype, relative to the largest term that entered each element."""
    for x, y, s in zip(actual, truth, scale, strict=True):
        wide = max(torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny)
        # one rounding when stored, the others in the type computed with; below the normal numbers steps are absolute
        computed = min(wide, torch.finfo(torch.float32).eps)
        limit = (wide + roundings * computed) * s.abs() + torch.finfo(x.dtype).smallest_normal
        assert ((x.double() - y).abs() <= limit).all()


def magnitudes(*terms):
    return [sum(term.abs() for term in place) for place in zip(*terms, strict=True)]


CASES = [
    *(pytest.param([(size,)], dtype, True, id=f"{size}-{dtype}") for size in SIZES for dtype in DTYPES),
    *(pytest.param([(LARGE,)], dtype, True, id=f"{LARGE}-{dtype}") for dtype in (torch.float32, torch.bfloat16)),
    *(pytest.param([(7, 5), (3,), (2, 3, 4)], dtype, False, id=f"strided-{dtype}") for dtype in DTYPES),
    pytest.param([(1025,)], torch.float32, False, id="strided-1025"),
    pytest.param([(2**17,)] + [(k % 5,) for k in range(100)], torch.float32, True, id="huge-and-tiny"),
    pytest.param([(k % 7, 3) for k in range(200)], torch.bfloat16, True, id="all-tiny"),
    pytest.param([(), (1, 1), (0, 4), (33,)], torch.float32, True, id="scalars"),
]
everywhere = pytest.mark.parametrize(("shapes", "dtype", "contiguous"), CASES)
a_few = pytest.mark.parametrize(
    ("shapes", "dtype", "contiguous"),
    [
        *(pytest.param([(1025,), (3, 2)], dtype, True, id=str(dtype)) for dtype in DTYPES),
        pytest.param([(7, 5), (65,)], torch.float32, False, id="strided"),
        pytest.param([(2**17 + 3,), (5,)], torch.bfloat16, True, id="blocks"),
    ],
)
