"""How the work beside the passes grows: with the number of parameters, and of tensors.

A step of `optimistic` over a model that is nothing but parameters: its loss reads each of them once, so that the passes
are as cheap as they can be. What a step takes beyond two plain backward passes, measured in the same rounds, is listed:
displacement, dots, update, and all the bookkeeping, that of every tensor included.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Callable
from typing import Any

import gate
import pytest
import torch
from arms import lur, opened
from measure import interleaved
from torch import Tensor, nn

from fastlur.losses import cross_entropy, negative_cross_entropy

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SIZES = (100_000, 1_000_000, 10_000_000, *((100_000_000,) if FULL else ()))
TENSORS = (1, 10, 100, 1000)
CASES = [(size, 62) for size in SIZES] + [(size, tensors) for size in (100_000, 10_000_000) for tensors in TENSORS]


class Heap(nn.Module):
    """Parameters in equal tensors; the two logits of an item are multiples of their sum."""

    def __init__(self, size: int, tensors: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(size // tensors) / size for _ in range(tensors))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.stack([part.sum() for part in self.parts]).sum()
        return x * total


@pytest.mark.parametrize(("size", "tensors"), CASES)
def test_growth(size: int, tensors: int, benchmark: Any, record: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    batch = _drawn(4, 0)
    model = Heap(size, tensors)
    gate.check(Heap(1000, tensors), *(_drawn(8, seed) for seed in (1, 2)), "optimistic", "fp32")
    plain = gradients(model, batch)
    with opened(model, lur("optimistic"), batch, batch) as step:
        made = {"gradients": plain, "step": lambda: step(batch, batch)}
        times = interleaved(made, 4.0, fewest=12, most=60)
        benchmark.pedantic(made["step"], rounds=1)
    beside = [whole - bare for whole, bare in zip(times["step"], times["gradients"], strict=True)]
    low, middle, high = statistics.quantiles(beside, n=4)
    row = {
        "parameters": size,
        "tensors": tensors,
        "gradients_seconds": round(statistics.median(times["gradients"]), 6),
        "beside_them_seconds": [round(x, 6) for x in (middle, low, high)],
        "nanoseconds_a_parameter": round(1e9 * middle / size, 3),
    }
    record.append(row)
    benchmark.extra_info.update(row)
    print(f"\n{size:.0e} parameters in {tensors} tensors: {1e3 * middle:.2f} ms beside the gradients")


def _drawn(items: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, 2, generator=generator), torch.randint(0, 2, (items,), generator=generator)


def gradients(model: nn.Module, batch: Any) -> Callable[[], object]:
    """Two plain backward passes, each into gradients of its own, and nothing more."""
    model = copy.deepcopy(model)

    def run() -> None:
        for loss in (cross_entropy, negative_cross_entropy):
            model.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]

    return run
