"""How the work beside the passes grows: with the number of parameters, and of tensors.

A step of `optimistic` over a model that is nothing but parameters: its loss reads each of them
once, so that the passes are as cheap as they can be. What a step takes beyond its own two passes, measured in the same
run, is what is listed: per parameter it should be flat in their number, and flat in the number of tensors.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import pytest
import torch
from arms import lur, opened
from torch import Tensor, nn

from fastlur.passes import Passes

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SIZES = (100_000, 1_000_000, 10_000_000, *((100_000_000,) if FULL else ()))
TENSORS = (1, 10, 100, 1000)
CASES = [(size, 62) for size in SIZES] + [(10_000_000, tensors) for tensors in TENSORS]


class Heap(nn.Module):
    """Parameters in equal tensors; the two logits of an item are multiples of their sum."""

    def __init__(self, size: int, tensors: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(size // tensors) / size for _ in range(tensors))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.stack([part.sum() for part in self.parts]).sum()
        return x * total


@pytest.mark.parametrize(("size", "tensors"), CASES)
def test_growth(
    size: int, tensors: int, benchmark: Any, record: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    batch = torch.randn(4, 2), torch.randint(0, 2, (4,))
    spent: list[float] = []
    gradient = Passes.gradient

    def timed(self: Passes, *arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        gradient(self, *arguments, **options)
        spent.append(time.perf_counter() - began)

    monkeypatch.setattr(Passes, "gradient", timed)
    with opened(Heap(size, tensors), lur("optimistic"), batch, batch) as step:
        beside = []
        for number in range(24):
            spent.clear()
            began = time.perf_counter()
            step(batch, batch)
            whole = time.perf_counter() - began
            if number >= 4:
                beside.append(whole - sum(spent))
        benchmark.pedantic(lambda: step(batch, batch), rounds=1)
    low, middle, high = statistics.quantiles(beside, n=4)
    row = {
        "parameters": size,
        "tensors": tensors,
        "beside_the_passes_seconds": [round(x, 6) for x in (middle, low, high)],
        "nanoseconds_a_parameter": round(1e9 * middle / size, 3),
    }
    record.append(row)
    benchmark.extra_info.update(row)
    print(f"\n{size:.0e} parameters in {tensors} tensors: {1e3 * middle:.2f} ms beside the passes")
