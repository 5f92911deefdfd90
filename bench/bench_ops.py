"""Every vector operation against its best spelling in torch, in one run, beside a copy of the same size.

Correctness comes first, at the size that is measured and against float64: a wrong operation gets no figure, and with
one wrong none is kept. Sizes: 1e5, 1e6, ResNet-18 (11.2e6 in its 62 tensors, as a list and as one flat buffer); with
FASTLUR_BENCH_FULL=1 also 1e8, on a GPU 1e9, and every spelling through `torch.compile`.
"""

from __future__ import annotations

import os
from itertools import cycle
from typing import Any

import pytest
import torch
from measure import interleaved, medians
from shapes import numel, resnet18
from spellings import ALPHA, DECAY, DOTS, L1, LR, MOMENTUM, OPERATIONS, PROX, Arm, Vectors, compiled, eager
from torch import Tensor

from fastlur import backends, ops
from fastlur.operands import control_scalars, hyper_parameters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SECONDS = 3.0 if FULL else 1.0
CACHE = 256 << 20  # bytes; a GPU's arms go round buffers of this size together, or they would measure its cache

LAYOUTS: dict[str, list[tuple[int, ...]]] = {
    "1e5 flat": [(100_000,)],
    "1e6 flat": [(1_000_000,)],
    "11.2e6 flat": [(numel(resnet18()),)],
    "11.2e6 in 62 tensors": resnet18(),
}
if FULL:
    LAYOUTS["1e8 flat"] = [(100_000_000,)]
    if DEVICE.type == "cuda":
        LAYOUTS["1e9 flat"] = [(1_000_000_000,)]

# float32 reads and writes an element
TRAFFIC = {
    "grad_dot": 2,
    "displace": 3,
    "project": 3,
    "regularize": 4,
    "sgd": 6,
    "adamw": 8,
    "extrapolate": 3,
    "saliency": 3,
}


def ours(name: str, v: Vectors) -> Arm:
    """The operation on the vectors, hyper-parameters already on the device."""
    control = control_scalars(DEVICE)
    control[1] = 1
    hyper = hyper_parameters(DEVICE, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    dots, alpha, one = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (DOTS, ALPHA, 1.0))
    arms: dict[str, Arm] = {
        "grad_dot": lambda: ops.grad_dot(v[0], v[1]),
        "displace": lambda: ops.displace(v[2], v[0], v[1], alpha),
        "project": lambda: ops.project(v[0], v[1], dots),
        "regularize": lambda: ops.regularize(v[2], v[0], v[1], l2=DECAY, l1=L1, prox=PROX),
        "sgd": lambda: ops.meta_update(v[2], v[0], v[1], v[3], control=control, hyper=hyper),
        "adamw": lambda: ops.meta_update(v[2], v[0], v[1], v[3], v[4], control=control, hyper=hyper),
        "extrapolate": lambda: ops.extrapolate(v[2], v[0], v[1], alpha, one),
        "saliency": lambda: ops.saliency(v[2], v[0], v[1]),
    }
    return arms[name]


def vectors(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Vectors:
    """Five vectors of random numbers in [0, 1), the same ones whatever the dtype."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [[torch.rand(s, device=DEVICE, generator=generator).to(dtype) for s in shapes] for _ in range(5)]


def check(name: str, shapes: list[tuple[int, ...]]) -> None:
    """The operation in float32 must be the plain one in float64; raises where it is not."""
    found: list[list[Tensor]] = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, backends.serving(DEVICE.type))):
        v = vectors(shapes, 0, dtype)
        with backends.backend(backend):
            result = ours(name, v)()
        returned = [result] if isinstance(result, Tensor) else list(result or ())
        found.append([t for each in v for t in each] + returned)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def rotating(arms: list[Arm]) -> Arm:
    """One arm that goes round several, each on buffers of its own."""
    turn = cycle(arms)
    return lambda: next(turn)()


def plain(arm: Arm) -> Arm:
    """The same by the plain backend."""

    def forced() -> object:
        with backends.backend("torch"):
            return arm()

    return forced


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler imports deprecated parts of torch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, layout: str, benchmark: Any, record: list[dict[str, Any]]) -> None:
    shapes = LAYOUTS[layout]
    size, backend = numel(shapes), backends.serving(DEVICE.type)
    if size < 1e9:  # in float64 that would not fit beside it
        check(name, shapes)
    sets = 1 if DEVICE.type == "cpu" else max(1, CACHE // (4 * size))
    held = [vectors(shapes, seed) for seed in range(sets)]
    source, target = torch.rand(2, size, device=DEVICE)
    mine = [ours(name, v) for v in held]
    arms: dict[str, Arm] = {"ours": rotating(mine), "copy": lambda: target.copy_(source)}
    if backend != "torch":
        arms["plain"] = rotating([plain(arm) for arm in mine])
    spelled = [eager(name, v) for v in held]
    arms |= {f"torch: {how}": rotating([each[how] for each in spelled]) for how in spelled[0]}
    if FULL:
        arms["torch: compiled"] = rotating([compiled(name, v) for v in held[:1]])
    times = medians(interleaved(arms, SECONDS))
    best = min((how for how in times if how.startswith("torch: ")), key=lambda how: times[how])
    row = {
        "operation": name,
        "layout": layout,
        "backend": backend,
        "seconds": {how: round(spent, 7) for how, spent in times.items()},
        "best_torch": best.removeprefix("torch: "),
        "times_as_fast_as_best_torch": round(times[best] / times["ours"], 2),
        "times_as_fast_as_foreach": round(times["torch: foreach"] / times["ours"], 2),
        "gigabytes_per_second": round(TRAFFIC[name] * 4 * size / times["ours"] / 1e9, 2),
        "copy_gigabytes_per_second": round(2 * 4 * size / times["copy"] / 1e9, 2),
    }
    record.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(arms["ours"], rounds=3)
