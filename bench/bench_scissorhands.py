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
from arms import bare, lur, opened, parts
from measure import interleaved, medians, ratio
from models import MODELS

from fastlur import ops
from fastlur.methods import METHODS
from fastlur.step import Step

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SECONDS = 60.0 if FULL else 10.0


def in_conflict(step: Step, forget: Any, retain: Any) -> bool:
    """Whether the joint gradient still points against the memory."""
    repair: Any = step.state
    with step.passes.of_step(2, forget, retain):
        repair.joint_gradient()
        dots = ops.grad_dot(repair.gradient.flats, repair.memories[0].flats)[0]
    return bool(dots[0] < 0)


def repaired(step: Step, forget: Any, retain: Any) -> bool:
    """Whether a step in conflict takes the conflict away: 1 % of it may be left, which is rounding."""
    repair: Any = step.state
    memory = repair.memories[0].flats
    with step.passes.of_step(2, forget, retain):
        repair.joint_gradient()
        before = ops.grad_dot(repair.gradient.flats, memory)[0][0]
        repair.project()
        after = ops.grad_dot(repair.gradient.flats, memory)[0][0]
    return bool(before < 0) and bool(after >= 0.01 * before)


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
    for mode in ("optimistic", "secant"):
        gate.check(model, batch(8, 2), batch(8, 3), mode, "fp32")
    with ExitStack() as stack:
        made: dict[str, Callable[[], object]] = {"bare": bare(model, forget, retain, "fp32")}
        for mode in ("optimistic", "secant"):
            step = stack.enter_context(opened(model, lur(mode), forget, retain))
            made[f"LUR, {mode}"] = lambda step=step: step(forget, retain)  # type: ignore[misc]
        conflicts = []
        for form in ("cleaned", "as_published"):
            for name in ("step in conflict", "retain-only step", "anchors, once an epoch", "trim, a batch"):
                if (form, name) == ("as_published", "trim, a batch"):
                    continue  # which both forms have in common
                step = stack.enter_context(opened(model, METHODS["scissorhands"](form=form, trim=None), forget, retain))
                made[f"{form}: {name}"] = parts(step, forget, retain)[name]
                if name == "step in conflict":
                    conflicts.append(step)
        times = interleaved(made, SECONDS, fewest=8 if FULL else 5)
        assert all(in_conflict(step, forget, retain) for step in conflicts), "steps in conflict were none"
        assert all(repaired(step, forget, retain) for step in conflicts), "a step in conflict was not repaired"
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
            form: [round(x, 3) for x in ratio(times, "LUR, optimistic", f"{form}: step in conflict")]
            for form in ("cleaned", "as_published")
        },
        "collection_seconds": round(collected, 5),
        "optimistic_to_without_collection": [round(x, 3) for x in ratio(without, "LUR, optimistic", published)],
    }
    record.append(row)
    benchmark.extra_info.update(row)
    print(f"\nResNet-18, batch {items} + {items}, × a plain two-loss step:")
    for arm, (middle, low, high) in row["ratio_to_bare"].items():  # type: ignore[attr-defined]
        print(f"  {arm}: {middle:.2f} [{low:.2f}, {high:.2f}]")
