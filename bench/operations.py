"""Every vector operation against its best spelling in torch, in one run, beside a copy of the same size.

Correctness comes first, at the size that is measured and against float64, for torch's spellings as for ours: what is
wrong gets no figure, and with one wrong none is kept. Sizes: 1e5, 1e6, ResNet-18 (11.2e6 in its 62 tensors, as a list
and as one flat buffer); in full also 1e8, on a GPU 1e9, and every operation through `torch.compile`.
"""

from __future__ import annotations

import statistics
from itertools import cycle
from typing import Any

import torch
from measure import interleaved, medians, ratio
from shapes import numel, resnet18
from spellings import (
    ALPHA,
    CLIP,
    DECAY,
    DOTS,
    L1,
    LR,
    MOMENTUM,
    OPERATIONS,
    PROX,
    SHARE,
    Arm,
    Vectors,
    compiled,
    decided,
    eager,
)
from torch import Tensor
from traffic import TRAFFIC

from fastlur import backends, ops
from fastlur.operands import control_scalars, hyper_parameters
from fastlur.reference import OK, SCALE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CACHE = 256 << 20  # bytes; a GPU's arms go round buffers of this size together, or they would measure its cache

Shapes = list[tuple[int, ...]]
Arms = dict[str, list[Arm]]  # by name, one for each set of buffers


def layouts(full: bool, gpu: bool) -> dict[str, Shapes]:
    """What is measured, by name."""
    found: dict[str, Shapes] = {
        "1e5 flat": [(100_000,)],
        "1e6 flat": [(1_000_000,)],
        "11.2e6 flat": [(numel(resnet18()),)],
        "11.2e6 in 62 tensors": resnet18(),
    }
    if full:
        found["1e8 flat"] = [(100_000_000,)]
    if full and gpu:
        found["1e9 flat"] = [(1_000_000_000,)]
    return found


def cases(full: bool, gpu: bool) -> list[tuple[str, str]]:
    """Every operation in every layout; the decision of a step is about eight scalars, whatever the layout."""
    vectorial = [name for name in OPERATIONS if name != "step_control"]
    return [(name, layout) for name in vectorial for layout in layouts(full, gpu)] + [("step_control", "scalars")]


def ours(name: str, v: Vectors) -> Arm:
    """The operation on the vectors, hyper-parameters already on the device."""
    control = control_scalars(DEVICE)
    control[1] = 1
    hyper = hyper_parameters(DEVICE, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    dots, alpha, one = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in (DOTS, ALPHA, 1.0))
    verdict, clipped = control_scalars(DEVICE), hyper_parameters(DEVICE, lr=LR, clip=CLIP)
    losses, decision_made = decided(DEVICE)[3], (verdict[OK], verdict[SCALE])

    def decision() -> tuple[Tensor, Tensor]:
        ops.step_control(verdict, dots, losses, clipped)
        return decision_made

    arms: dict[str, Arm] = {
        "grad_dot": lambda: ops.grad_dot(v[0], v[1]),
        "displace": lambda: ops.displace(v[2], v[0], v[1], alpha),
        "project": lambda: ops.project(v[0], v[1], dots),
        "regularize": lambda: ops.regularize(v[2], v[0], v[1], l2=DECAY, l1=L1, prox=PROX),
        "sgd": lambda: ops.meta_update(v[2], v[0], v[1], v[3], control=control, hyper=hyper),
        "adamw": lambda: ops.meta_update(v[2], v[0], v[1], v[3], v[4], control=control, hyper=hyper),
        "extrapolate": lambda: ops.extrapolate(v[2], v[0], v[1], alpha, one),
        "saliency": lambda: ops.saliency(v[2], v[0], v[1]),
        "threshold": lambda: ops.threshold(v[0], SHARE),
        "step_control": decision,
    }
    return arms[name]


def vectors(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32) -> Vectors:
    """Five vectors of random numbers in [0, 1), the same ones whatever the dtype."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [[torch.rand(s, device=DEVICE, generator=generator).to(dtype) for s in shapes] for _ in range(5)]


def names(backend: str, operation: str, full: bool) -> list[str]:
    """The arms of an operation: ours, the plain backend where another one serves, and torch's spellings."""
    few = [[torch.zeros(3, device=DEVICE)] for _ in range(5)]
    spelled = [*eager(operation, few), *(["compiled"] if full else [])]
    return ["ours", *(["plain"] if backend != "torch" else []), *(f"torch: {how}" for how in spelled)]


def arms_of(name: str, held: list[Vectors], backend: str, full: bool, compiler: str = "inductor") -> Arms:
    """What is compared, a copy apart."""
    mine = [ours(name, v) for v in held]
    spelled = [eager(name, v) for v in held]
    found = {"ours": mine, "plain": [plain(arm) for arm in mine]}
    found |= {f"torch: {how}": [each[how] for each in spelled] for how in spelled[0]}
    if full:
        found["torch: compiled"] = compiled(name, held, compiler)
    return {how: found[how] for how in names(backend, name, full)}


def outcome(arm: Arm, v: Vectors) -> list[Tensor]:
    """What an arm leaves in the vectors, and what it returns."""
    result: Any = arm()
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    return [t for each in v for t in each] + returned


def check(name: str, shapes: Shapes, arms: Arms, v: Vectors) -> None:
    """Every arm, once on the vectors `v`, must do what the plain operation does in float64, or this raises."""
    exact = vectors(shapes, 0, torch.float64)
    with backends.backend("torch"):
        expected = outcome(ours(name, exact), exact)
    inside = sum(len(each) for each in v)
    given = vectors(shapes, 0)
    # torch adds up in float32: of 1e8 products its dot is off by 0.16 %, its norm's square by 1.2 %
    roughness = 1e-3 if numel(shapes) < 1e8 else 2e-2
    for how, (arm, *_) in arms.items():
        for each, values in zip(v, given, strict=True):
            for tensor, value in zip(each, values, strict=True):
                tensor.copy_(value)
        found = outcome(arm, v)
        assert len(found) == len(expected), f"{how} returns another number of tensors"
        for place, (want, got) in enumerate(zip(expected, found, strict=True)):
            if torch.equal(got, want.to(got.dtype)):  # most are, and the rest takes long
                continue
            rtol = roughness if how.startswith("torch: ") and place >= inside else 1e-5
            torch.testing.assert_close(
                got.double(), want, rtol=rtol, atol=1e-6, msg=lambda text, how=how: f"{how}: {text}"
            )


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


def copies(size: int, sets: int) -> list[Arm]:
    """A copy of as many elements, on several pairs of buffers."""
    pairs = [torch.rand(2, size, device=DEVICE) for _ in range(sets)]
    return [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]


def measured(
    name: str, layout: str, shapes: Shapes, full: bool, seconds: float, compiler: str = "inductor"
) -> dict[str, Any]:
    """The row of an operation: every arm checked, then timed in turn."""
    size, backend = numel(shapes), backends.serving(DEVICE.type)
    sets = 1 if DEVICE.type == "cpu" else max(1, CACHE // (4 * size))
    held = [vectors(shapes, seed) for seed in range(sets)]
    arms = arms_of(name, held, backend, full, compiler)
    if size < 1e9:  # in float64 that would not fit beside it
        check(name, shapes, arms, held[0])
    arms["copy"] = copies(size, sets)
    times = interleaved({how: rotating(each) for how, each in arms.items()}, seconds)
    middle = medians(times)
    best = min((how for how in middle if how.startswith("torch: ")), key=lambda how: middle[how])
    faster, low, high = ratio(times, best, "ours")
    foreach = middle.get("torch: foreach")
    quartiles = {how: statistics.quantiles(each, n=4)[::2] for how, each in times.items()}
    return {
        "operation": name,
        "layout": layout,
        "backend": backend,
        "seconds": {how: round(spent, 7) for how, spent in middle.items()},
        "quartiles": {how: [round(spent, 7) for spent in each] for how, each in quartiles.items()},
        "best_torch": best.removeprefix("torch: "),
        "times_as_fast_as_best_torch": round(faster, 2),
        "quartiles_of_that": [round(low, 2), round(high, 2)],
        "times_as_fast_as_foreach": round(foreach / middle["ours"], 2) if foreach else None,
        "gigabytes_per_second": round(TRAFFIC[name] * 4 * size / middle["ours"] / 1e9, 2),
        "copy_gigabytes_per_second": round(2 * 4 * size / middle["copy"] / 1e9, 2),
    }
