"""What makes a step cheaper: bfloat16 passes, channels_last, a compiled forward; a plain step and LUR's in each.

All are ratios to a plain step in float32, in one run. A step of LUR passes the gate in each of them first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gate
import models
import pytest
import torch
from arms import bare, lur, opened
from measure import interleaved, medians, ratio
from models import MODELS

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
LAST: dict[str, Any] = {"memory_format": torch.channels_last}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("fp32", {}),
    "bfloat16": ("bf16", {}),
    "channels_last": ("fp32", LAST),
    "bfloat16, channels_last": ("bf16", LAST),
    "compiled": ("fp32", {"compile": True}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler imports deprecated parts of torch
@pytest.mark.skipif(not FULL, reason="a compiler takes its time; FASTLUR_BENCH_FULL=1")
@pytest.mark.parametrize("items", [8, 64])
def test_cheaper(items: int, benchmark: Any, record: list[dict[str, Any]]) -> None:
    _, batch = MODELS["resnet18"]
    model, forget, retain = models.model("resnet18"), batch(items, 0), batch(items, 1)
    with ExitStack() as stack:
        made: dict[str, Callable[[], object]] = {}
        for way, (precision, options) in WAYS.items():
            gate.check(model, batch(8, 2), batch(8, 3), "optimistic", precision, **options)
            made[f"bare, {way}"] = bare(model, forget, retain, precision, **options)
            step = stack.enter_context(opened(model, lur("optimistic"), forget, retain, precision=precision, **options))
            made[f"optimistic, {way}"] = lambda step=step: step(forget, retain)  # type: ignore[misc]
        times = interleaved(made, 60.0, fewest=5)
        benchmark.pedantic(made["optimistic, float32"], rounds=1)
    row = {
        "items": items,
        "rounds": len(times["bare, float32"]),
        "bare_seconds": round(medians(times)["bare, float32"], 5),
        "ratio_to_bare": {
            arm: [round(x, 3) for x in ratio(times, arm, "bare, float32")] for arm in times if arm != "bare, float32"
        },
    }
    record.append(row)
    benchmark.extra_info.update(row)
    print(f"\nResNet-18, batch {items} + {items}, × a plain two-loss step in float32:")
    for arm, (middle, low, high) in row["ratio_to_bare"].items():  # type: ignore[attr-defined]
        print(f"  {arm}: {middle:.2f} [{low:.2f}, {high:.2f}]")
