"""The price of a step: LUR's four gradients and other methods against a plain two-loss step.

Every figure is a ratio taken in one run, with the arms interleaved (A B A B …), since machines drift by more than the
differences that matter, and comes with its quartiles. No ratio is given for a step of LUR that does not align, or for
one of another method that goes elsewhere than in float64 (see `gate`).
The short form measures the small cases; FASTLUR_BENCH_FULL=1 all of them.
"""

from __future__ import annotations

import os
from typing import Any

import gate
import models
import pytest
import torch
from arms import AS_IT_COMES, FEW, FRUGAL, LENT, MODES, OTHERS, arms
from measure import interleaved, medians, ratio
from models import MODELS

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SECONDS = 20.0 if FULL else 10.0
ROUNDS = {("resnet18", 64, "fp32", None): 6, ("resnet18", 8, "fp32", None): 16}  # where a target is set; elsewhere 4
EVERYTHING = (*MODES, LENT, AS_IT_COMES, FRUGAL, *OTHERS)
PLAIN = tuple(arm for arm in EVERYTHING if arm != LENT)  # there is nothing to lend where there is no batch norm
CASES = [
    (model, batch, precision, None, EVERYTHING if model == "resnet18" else PLAIN)
    for model in ("mlp", "vit", "resnet18")
    for batch in (8, 64)
    for precision in ("fp32", "bf16")
] + [
    ("resnet18", 64, "fp32", "channels_last", MODES),
    ("resnet18", 64, "bf16", "channels_last", MODES),
    ("swin_t", 2, "fp32", None, MODES),
    ("lm_100m", 1, "fp32", None, MODES),
]
SHORT = [("mlp", 64, "fp32", None, PLAIN), ("vit", 8, "fp32", None, FEW), ("resnet18", 8, "fp32", None, FEW)]


@pytest.mark.parametrize(("name", "items", "precision", "layout", "others"), CASES if FULL else SHORT)
def test_step(
    name: str,
    items: int,
    precision: str,
    layout: str | None,
    others: tuple[str, ...],
    benchmark: Any,
    record: list[dict[str, Any]],
) -> None:
    _, batch = MODELS[name]
    model = models.model(name)
    small = batch(min(items, 8), 2), batch(min(items, 8), 3)
    options = {} if layout is None else {"memory_format": getattr(torch, layout)}
    checked = [arm for arm in others if arm.split(",")[0] in MODES]
    found = gate.check_all(model, *small, checked, precision, **options)
    gate.check_others(model, *small, set(others) & set(OTHERS), precision, **options)
    cosines = {arm: round(cosine, 3) for arm, cosine in found.items()}
    with arms(model, batch(items, 0), batch(items, 1), precision, others, **options) as made:
        times = interleaved(made, SECONDS, fewest=ROUNDS.get((name, items, precision, layout), 4) if FULL else 4)
        benchmark.pedantic(made["optimistic"], rounds=1)
    row = {
        "model": name,
        "batch": items,
        "precision": precision,
        "memory_format": layout,
        "rounds": len(times["bare"]),
        "bare_seconds": round(medians(times)["bare"], 5),
        "ratio_to_bare": {arm: [round(x, 3) for x in ratio(times, arm, "bare")] for arm in times if arm != "bare"},
        "alignment_cosine": cosines,
    }
    record.append(row)
    benchmark.extra_info.update(row)
    ratios = "  ".join(f"{arm} {values[0]:.2f}" for arm, values in row["ratio_to_bare"].items())
    print(
        f"\n{name}, batch {items} + {items}, {precision}, {layout or 'contiguous'}, × a plain two-loss step: {ratios}"
    )
