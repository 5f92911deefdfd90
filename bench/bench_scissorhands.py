"""What the parts of ScissorHands cost in both forms: trim, anchors of an epoch, step in conflict, retain-only step.

Beside them LUR's steps, all in one run, as ratios to a plain two-loss step. Conflicts are made, not awaited: the memory
is set against the gradient. The published form collects Python's garbage in every step, which takes as long as the
process has objects, whatever the model: that is timed apart.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gate
import models
import pytest
from arms import AS_IT_COMES, PARTED, aim, bare, lur, opened
from conflict import parts, repairs
from measure import interleaved, medians, ratio
from models import MODELS

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SECONDS = 60.0 if FULL else 10.0


def collection() -> float:
    """Seconds that one collection of Python's garbage takes here, median of five."""
    found = []
    for _ in range(5):
        began = time.perf_counter()
        gc.collect()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


@pytest.mark.parametrize("items", [8, 64] if FULL else [8])
def test_parts(items: int, benchmark: Any, record: list[dict[str, Any]]) -> None:
    _, batch = MODELS["resnet18"]
    model, forget, retain = models.model("resnet18"), batch(items, 0), batch(items, 1)
    ours = ("optimistic", AS_IT_COMES, "secant")
    gate.check_all(model, batch(8, 2), batch(8, 3), ours, "fp32")
    with ExitStack() as stack:
        made: dict[str, Callable[[], object]] = {"bare": bare(model, forget, retain, "fp32")}
        for mode in ours:
            step = stack.enter_context(opened(model, lur(mode), forget, retain, forget_loss=aim(mode)))
            made[f"LUR, {mode}"] = lambda step=step: step(forget, retain)  # type: ignore[misc]
        conflicts = []
        for form in PARTED:
            arms, conflict = parts(stack, form, model, forget, retain)
            conflicts.append(conflict)
            if form == "as_published":
                del arms["trim, a batch"]  # which both forms have in common
            made |= {f"{form}: {name}": arm for name, arm in arms.items()}
        times = interleaved(made, SECONDS, fewest=8 if FULL else 5)
        assert all(repairs(step, forget, retain) for step in conflicts), (
            "not every step was in conflict, and repaired it"
        )
        collected = collection()
        benchmark.pedantic(made["LUR, optimistic"], rounds=1)
    published = "as_published: step in conflict"
    without = times | {published: [each - collected for each in times[published]]}
    row = {
        "model": "resnet18",
        "batch": items,
        "rounds": len(times["bare"]),
        "bare_seconds": round(medians(times)["bare"], 5),
        "ratio_to_bare": {arm: [round(x, 3) for x in ratio(times, arm, "bare")] for arm in times if arm != "bare"},
        "optimistic_to": {
            form: [round(x, 3) for x in ratio(times, "LUR, optimistic", f"{form}: step in conflict")] for form in PARTED
        },
        "as_it_comes_to": {
            form: [round(x, 3) for x in ratio(times, f"LUR, {AS_IT_COMES}", f"{form}: step in conflict")]
            for form in PARTED
        },
        "collection_seconds": round(collected, 5),
        "optimistic_to_without_collection": [round(x, 3) for x in ratio(without, "LUR, optimistic", published)],
    }
    record.append(row)
    benchmark.extra_info.update(row)
    print(f"\nResNet-18, batch {items} + {items}, × a plain two-loss step:")
    for arm, (middle, low, high) in row["ratio_to_bare"].items():  # type: ignore[attr-defined]
        print(f"  {arm}: {middle:.2f} [{low:.2f}, {high:.2f}]")
