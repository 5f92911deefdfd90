"""Every vector operation against its best spelling in torch, in one run, beside a copy of the same size.

Correctness comes first: an operation whose result differs from the plain one's gets no figure. Sizes: 1e5, 1e6,
ResNet-18 (11.2e6 in its 62 tensors, as a list and as one flat buffer) and, with FASTLUR_BENCH_FULL=1, 1e8.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import interleaved
from torch import Tensor

from fastlur import backends, ops
from fastlur.operands import control_scalars, hyper_parameters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SECONDS = 4.0 if FULL else 1.0


def resnet18() -> list[tuple[int, ...]]:
    """The shapes of ResNet-18's 62 parameters, for 32 × 32 images and 10 classes."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            inputs = before if block == 0 else width
            shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
        before = width
    return [*shapes, (10, 512), (10,)]


LAYOUTS: dict[str, list[tuple[int, ...]]] = {
    "1e5 flat": [(100_000,)],
    "1e6 flat": [(1_000_000,)],
    "11.2e6 flat": [(sum(int(torch.Size(s).numel()) for s in resnet18()),)],
    "11.2e6 in 62 tensors": resnet18(),
}
if FULL:
    LAYOUTS["1e8 flat"] = [(100_000_000,)]

Arm = Callable[[], object]
Vectors = list[list[Tensor]]
# operation: (vectors it needs, float32 reads and writes an element, function of the vectors, torch spellings of it)
OPERATIONS = ("grad_dot", "displace", "project", "regularize", "sgd", "adamw", "extrapolate", "saliency")
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
    hyper = hyper_parameters(DEVICE, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    dots = torch.tensor([-0.5, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
    alpha, one = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (0.1, 1.0))
    arms: dict[str, Arm] = {
        "grad_dot": lambda: ops.grad_dot(v[0], v[1]),
        "displace": lambda: ops.displace(v[2], v[0], v[1], alpha),
        "project": lambda: ops.project(v[0], v[1], dots),
        "regularize": lambda: ops.regularize(v[2], v[0], v[1], l2=1e-4, l1=1e-6, prox=1e-3),
        "sgd": lambda: ops.meta_update(v[2], v[0], v[1], v[3], control=control, hyper=hyper),
        "adamw": lambda: ops.meta_update(v[2], v[0], v[1], v[3], v[4], control=control, hyper=hyper),
        "extrapolate": lambda: ops.extrapolate(v[2], v[0], v[1], alpha, one),
        "saliency": lambda: ops.saliency(v[2], v[0], v[1]),
    }
    return arms[name]


def torchs(name: str, v: Vectors) -> dict[str, Arm]:
    """What a careful user of torch would write; the names say how."""
    flat = len(v[0]) == 1
    each: Any = torch

    def joint() -> list[Tensor]:
        return list(each._foreach_add(v[0], v[1]))

    def optimizer(kind: Any, **options: Any) -> Arm:
        parameters = [torch.nn.Parameter(x.clone()) for x in v[2]]
        made = kind(parameters, lr=1e-3, weight_decay=1e-4, **options)

        def step() -> None:
            for parameter, gradient in zip(parameters, joint(), strict=True):
                parameter.grad = gradient
            made.step()

        return step

    def penalties() -> None:
        each._foreach_add_(v[2], v[0], alpha=1e-4)
        each._foreach_add_(v[2], [x.sign() for x in v[0]], alpha=1e-6)
        each._foreach_add_(v[2], each._foreach_sub(v[0], v[1]), alpha=1e-3)
        sum(x.square().sum() for x in v[0]), sum(x.abs().sum() for x in v[0])
        sum(x.square().sum() for x in each._foreach_sub(v[0], v[1]))

    def away() -> None:
        each._foreach_copy_(v[2], v[0])
        each._foreach_mul_(v[2], 1.1)
        each._foreach_add_(v[2], v[1], alpha=-0.1)

    def salient() -> None:
        each._foreach_copy_(v[2], v[0])
        each._foreach_mul_(v[2], v[1])
        each._foreach_abs_(v[2])

    def displaced() -> None:
        each._foreach_copy_(v[2], v[0])
        each._foreach_add_(v[2], v[1], alpha=-0.1)

    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    pairs = [(x.view(-1), y.view(-1)) for x, y in zip(v[0], v[1], strict=True)]
    arms: dict[str, dict[str, Arm]] = {
        "grad_dot": {
            "dot": lambda: [(torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)) for x, y in pairs],
            "foreach": lambda: [
                [x.sum() for x in each._foreach_mul(p, q)] for p, q in ((v[0], v[1]), (v[0], v[0]), (v[1], v[1]))
            ],
        },
        "displace": {
            "foreach": displaced,
            **({"out=": lambda: torch.sub(v[0][0], v[1][0], alpha=0.1, out=v[2][0])} if flat else {}),
        },
        "project": {"foreach": lambda: each._foreach_add_(v[1], v[0], alpha=0.5)},
        "regularize": {"foreach": penalties},
        "sgd": {
            "foreach": optimizer(sgd, momentum=0.9, foreach=True),
            "fused": optimizer(sgd, momentum=0.9, fused=True),
        },
        "adamw": {"foreach": optimizer(adamw, foreach=True), "fused": optimizer(adamw, fused=True)},
        "extrapolate": {"foreach": away},
        "saliency": {"foreach": salient},
    }
    return arms[name]


def compiled(name: str, v: Vectors) -> dict[str, Arm]:
    """The same as a compiled function of lists; compiling takes its time, so only in the full form and for three."""

    def dots(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return [torch.stack(((x * y).sum(), (x * x).sum(), (y * y).sum())) for x, y in zip(a, b, strict=True)]

    def displaced(out: list[Tensor], theta: list[Tensor], d: list[Tensor]) -> None:
        for o, x, y in zip(out, theta, d, strict=True):
            o.copy_(x - 0.1 * y)

    def sgd(theta: list[Tensor], a: list[Tensor], u: list[Tensor], m: list[Tensor]) -> None:
        for t, x, y, first in zip(theta, a, u, m, strict=True):
            first.copy_(0.9 * first + x + y + 1e-4 * t)
            t.copy_(t - 1e-3 * first)

    functions: dict[str, tuple[Callable[..., object], list[list[Tensor]]]] = {
        "grad_dot": (dots, [v[0], v[1]]),
        "displace": (displaced, [v[2], v[0], v[1]]),
        "sgd": (sgd, [v[2], v[0], v[1], v[3]]),
    }
    if not FULL or name not in functions:
        return {}
    function, arguments = functions[name]
    torch._dynamo.reset()
    made = torch.compile(function, fullgraph=True, dynamic=False)
    return {"torch: compiled": lambda: made(*arguments)}


def check(name: str, shapes: list[tuple[int, ...]], backend: str) -> None:
    """The backend's result must be the plain one's; raises where it is not."""
    found: list[list[Tensor]] = []
    for which in ("torch", backend):
        torch.manual_seed(0)
        v = [[torch.rand(shape, device=DEVICE) for shape in shapes] for _ in range(5)]
        with backends.backend(which):
            result = ours(name, v)()
        returned = [result] if isinstance(result, Tensor) else list(result or ())
        found.append([t for each in v for t in each] + returned)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler imports deprecated parts of torch
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, layout: str, benchmark: Any, record: list[dict[str, Any]]) -> None:
    shapes = LAYOUTS[layout]
    backend = backends.serving(DEVICE.type)
    check(name, shapes if sum(torch.Size(s).numel() for s in shapes) < 2e7 else [(1_000_003,)], backend)
    torch.manual_seed(1)
    v = [[torch.rand(shape, device=DEVICE) for shape in shapes] for _ in range(5)]
    numel = sum(x.numel() for x in v[0])
    source, target = torch.rand(2, numel, device=DEVICE)
    arms: dict[str, Arm] = {"ours": ours(name, v), "copy": lambda: target.copy_(source)}
    if backend != "torch":
        mine = arms["ours"]

        def plain() -> object:
            with backends.backend("torch"):
                return mine()

        arms["plain"] = plain
    arms |= {f"torch: {how}": arm for how, arm in torchs(name, v).items()}
    arms |= compiled(name, v)
    times = interleaved(arms, SECONDS)
    best = min((how for how in times if how.startswith("torch: ")), key=lambda how: times[how])
    row = {
        "operation": name,
        "layout": layout,
        "backend": backend,
        "seconds": {how: round(spent, 7) for how, spent in times.items()},
        "best_torch": best.removeprefix("torch: "),
        "times_as_fast_as_best_torch": round(times[best] / times["ours"], 2),
        "times_as_fast_as_foreach": round(times["torch: foreach"] / times["ours"], 2),
        "gigabytes_per_second": round(TRAFFIC[name] * 4 * numel / times["ours"] / 1e9, 2),
        "copy_gigabytes_per_second": round(2 * 4 * numel / times["copy"] / 1e9, 2),
    }
    record.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(arms["ours"], rounds=3)
