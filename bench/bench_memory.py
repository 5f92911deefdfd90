"""What a step holds: peak memory of every arm, each in a fresh process, what its own accounting says, and `estimate`.

All figures are MiB beyond the parameters: the optimizer's vector and the method's (gradients included), activations,
batches. "before" is what is needed until the first step is done, a trim or a mask included; a step of ScissorHands is
one in conflict. How it is measured stands in `memory`. The short form takes two models; FASTLUR_BENCH_FULL=1 all, at 8
and 64 items a side, and the large ones at 2. What does not fit the machine is left out and named.
"""

from __future__ import annotations

import os
from typing import Any

import gate
import models
import pytest
from arms import AS_IT_COMES, FEW, FORMS, FRUGAL, LENT, MODES, OTHERS
from memory import ELSEWHERE, TooLarge, measured
from models import MODELS

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
ARMS = ("bare", *MODES, LENT, AS_IT_COMES, FRUGAL, *OTHERS, *ELSEWHERE)
CASES = [(name, items) for name in ("mlp", "vit", "resnet18") for items in (8, 64)]
CASES += [(name, 2) for name in ("swin_t", "lm_100m")]
SHORT = [("mlp", 8), ("resnet18", 8)]
SMALL = ("mlp", "vit", "resnet18")  # whose truth in float64 fits as well


def mebi(count: float) -> float:
    return round(count / 2**20, 2)


def row(name: str, items: int, arms: tuple[str, ...]) -> dict[str, Any]:
    """The arms, one after the other."""
    found: dict[str, dict[str, Any]] = {}
    too_large = []
    for arm in arms:
        try:
            found[arm] = measured(name, items, arm)
        except TooLarge:
            too_large.append(arm)
    size = next(iter(found.values()))["parameters"]
    steps = {arm: each["steps"] - size for arm, each in found.items()}
    whole = {arm: each["peak"] - size for arm, each in found.items()}
    told = {arm: each for arm, each in found.items() if "predicted" in each}
    return {
        "model": name,
        "batch": items,
        "parameters": mebi(size),
        "extra_in_steps": {arm: mebi(extra) for arm, extra in steps.items()},
        "extra_before": {arm: mebi(each["before"] - size) for arm, each in found.items()},
        "extra": {arm: mebi(extra) for arm, extra in whole.items()},
        "vectors_accounted": {arm: mebi(each["vectors"] * size) for arm, each in told.items()},
        "predicted": {arm: mebi(each["predicted"]["peak"] - size) for arm, each in told.items()},
        "error_of_peak": {arm: round(each["predicted"]["peak"] / each["peak"] - 1, 4) for arm, each in told.items()},
        "seconds": {arm: round(each["seconds"], 5) for arm, each in found.items()},
        "seconds_predicted": {arm: round(each["predicted"]["seconds"], 5) for arm, each in told.items()},
        "optimistic_to": {
            form: {
                "in_steps": round(steps["optimistic"] / steps[form], 3),
                "whole": round(whole["optimistic"] / whole[form], 3),
            }
            for form in FORMS
            if form in found and "optimistic" in found
        },
        "too_large": too_large,
    }


@pytest.mark.parametrize(("name", "items"), CASES if FULL else SHORT)
def test_memory(name: str, items: int, benchmark: Any, record: list[dict[str, Any]]) -> None:
    arms = ARMS if FULL or name == "mlp" else ("bare", *FEW)  # a process each takes its time
    if name in SMALL:
        _, batch = MODELS[name]
        checked = [arm for arm in arms if arm.split(",")[0] in MODES]
        small = models.model(name), batch(8, 2), batch(8, 3)
        gate.check_all(*small, checked, "fp32")
        gate.check_others(*small, set(OTHERS) & set(arms), "fp32")
    found = benchmark.pedantic(row, (name, items, arms), rounds=1)
    record.append(found)
    benchmark.extra_info.update(found)
    print(f"\n{name}, batch {items} + {items}, {found['parameters']} MiB of parameters; MiB beyond them:")
    for arm in found["extra"]:
        predicted = found["predicted"].get(arm)
        told = "" if predicted is None else f", predicted {predicted} ({found['error_of_peak'][arm]:+.1%} of the peak)"
        print(f"  {arm}: steps {found['extra_in_steps'][arm]}, at most {found['extra'][arm]}{told}")
    for form, ratios in found["optimistic_to"].items():
        print(f"  optimistic ÷ {form}: {ratios['in_steps']} in a step in conflict, {ratios['whole']} in the whole run")
    if found["too_large"]:
        print(f"  more than this machine has: {', '.join(found['too_large'])}")
