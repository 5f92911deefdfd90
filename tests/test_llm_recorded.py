"""What is asked of language models, held against the committed results: figures that no quick test can make anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llm.contenders import ARMS, ESSENTIAL, Journal
from llm.metrics import forget_quality
from llm.models import RECIPES
from llm.report import RESULTS
from llm.study import ALIKE, FINAL, KEPT, POWER, Study, tasks
from llm_memory import ARMS as ARMS_OF_MEMORY
from llm_memory import NOVICE

MEMORY = json.loads((Path(__file__).parent.parent / "bench" / "results" / "llm_memory.json").read_text())
ROWS = Journal(RESULTS / "smollm2-forget10.jsonl").rows
TRUTH, BEFORE = ROWS[f"truth/{FINAL}/0"], ROWS[f"before/{FINAL}"]
FORGOT = ("lur",)  # the documented recipe
MARGIN = 0.1  # of the forgotten values that may be said, over what a model says that never saw them


def final(arm):
    return ROWS[f"final/{FINAL}/{arm}"]


def test_the_real_model_was_asked_sixty_questions_with_the_documented_settings():
    assert len(TRUTH["ratios"]) == len(BEFORE["ratios"]) == 60
    for arm in ESSENTIAL:
        assert final(arm)["config"] == ARMS[arm].config("smollm2", 0)
        assert final(arm)["steps"] == RECIPES["smollm2"].steps and len(final(arm)["ratios"]) == 60
    assert next(tasks(Study("smollm2"), Journal(RESULTS / "smollm2-forget10.jsonl")), None) is None


def test_the_test_of_forgetting_has_power():
    assert forget_quality(BEFORE["ratios"], TRUTH["ratios"]) < POWER
    assert BEFORE["forget"]["known"] > 0.9 > TRUTH["forget"]["known"] + 0.5


@pytest.mark.parametrize("arm", FORGOT)
def test_what_has_forgotten_cannot_be_told_from_the_truth_and_is_as_useful(arm):
    assert forget_quality(final(arm)["ratios"], TRUTH["ratios"]) > ALIKE
    assert final(arm)["utility"] >= KEPT * TRUTH["utility"]
    assert final(arm)["forget_target"].startswith("Imitation(")
    assert "Paris" in final(arm)["france"] and "Paris" in BEFORE["france"]
    for asked in ("known", "again"):  # nor do paraphrased questions bring the authors back
        assert final(arm)["forget"][asked] <= TRUTH["forget"][asked] + MARGIN


@pytest.mark.parametrize("method", ["mox", "gradient_difference", "kl", "npo", "simnpo", "dpo", "idk", "rmu"])
def test_others_were_tried_with_the_rate_of_lur_and_the_updates_of_its_novice(method):
    row, kept = final(f"{method}_matched"), 600  # 540 about authors, 60 general ones
    assert row["config"] == ARMS[f"{method}_matched"].config("smollm2", 0)
    assert row["config"]["lr"] == final("lur")["config"]["lr"]
    assert row["steps"] == RECIPES["smollm2"].steps + RECIPES["smollm2"].novice * kept / RECIPES["smollm2"].batch_size


def test_a_retraining_in_the_seconds_of_lur_is_not_as_useful():
    early = [row for key, row in ROWS.items() if key.startswith("retrained/")]
    assert max(row["seconds"] for row in early) >= final("lur")["seconds"]
    for row in early:
        assert row["utility"] < KEPT * TRUTH["utility"] <= final("lur")["utility"]


def test_the_essential_part_takes_less_than_an_hour():
    """Training the two models is told by `seconds`, also where a run again found them trained and only judged them."""
    models = sum(row["wall"] + (row["seconds"] if row["wall"] < row["seconds"] else 0) for row in (BEFORE, TRUTH))
    assert models + sum(final(arm)["wall"] for arm in ESSENTIAL) + ROWS[f"novice/{FINAL}"]["wall"] < 3600


@pytest.mark.parametrize("row", MEMORY["rows"], ids=lambda row: row["moving"])
def test_a_step_holds_what_was_asked_beside_plain_fine_tuning(row):
    assert row["asked"] == (1.55 if row["moving"] == "all" else 1.3)
    assert list(row["peak_mib"]) == list(ARMS_OF_MEMORY) and list(row["ratio"]) == list(ARMS_OF_MEMORY)[1:]
    for mode, ratio in row["ratio"].items():
        assert ratio == pytest.approx(row["peak_mib"][mode] / row["peak_mib"]["plain"], abs=1e-3)
        if mode != NOVICE or row["moving"] == "all":  # with adapters a novice is a second base while it is trained
            assert ratio <= row["asked"]
    assert MEMORY["machine"]["commit"] and not MEMORY["machine"]["dirty"]
