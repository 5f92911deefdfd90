"""The study of forgetting is fair, goes on where it was broken off, and lets no final seed into a choice."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import replace

import pytest
import quality.work as working
import torch
from machine import commit
from matplotlib.axes import Axes
from quality import plan, summary, training, trial
from quality.contenders import ALIGNMENT, ARMS, DIRECTIONS, WEIGHTS, candidates, weights
from quality.journal import Journal
from quality.plan import Grid, chosen, gap, tasks
from quality.report import compared, draw, judged, overview, sections
from quality.scenarios import SCENARIOS
from quality.splits import FINAL
from quality.training import original, teacher
from quality.trial import Task, perform
from quality.work import counted, work
from quality_cases import FIGURES, SMALL, TINY, go_on, pretend

from fastlur import targets
from fastlur.methods import LUR
from fastlur.targets import NoviceOrAscent


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTLUR_CACHE", str(tmp_path_factory.getbasetemp() / "quality"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        journal = Journal(tmp_path_factory.mktemp("study") / "mlp-digits.jsonl")
        go_on(SMALL, journal)
        return journal


class Here:
    """In the place of a pool of processes: everything is done at once, in this one."""

    def __init__(self, *_, **__):
        self.made = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


class TestChoice:
    def test_it_waits_for_all_trials_and_takes_the_smallest_gap_on_the_tuning_split(self, tmp_path):
        grid = replace(SMALL, scenarios=("class",))
        better = {"lur": 1, "joint": 2, "salun": 0}

        def figures(task):
            off = 0.0 if task.kind == "truth" or better.get(task.arm) == task.number else 5.0
            return FIGURES | {"ua": 10.0 + off}

        journal = Journal(tmp_path / "j.jsonl")
        while (task := next(tasks(grid, journal), None)) is not None:
            if task.kind == "trial" and task.arm == "lur":
                assert chosen("lur", "class", journal, range(3)) is None
            journal.add(task.told | figures(task))
        for arm, number in better.items():
            assert chosen(arm, "class", journal, grid.numbers(arm))["key"] == f"trial/class/tune/{arm}/{number}"
            for where in FINAL:
                assert journal.rows[f"final/class/{where}/{arm}"]["config"] == ARMS[arm].config(number)

    def test_no_figure_of_a_final_seed_changes_it(self, study):
        before = {arm: chosen(arm, "class", study, SMALL.numbers(arm))["key"] for arm in SMALL.arms}
        changed = Journal(study.path)
        for key, row in changed.rows.items():
            if key.split("/")[0] in ("final", "before") or "/final" in key:
                changed.rows[key] = row | {"ua": 0.0, "ra": 0.0, "ta": 0.0, "mia": 0.0}
        assert {arm: chosen(arm, "class", changed, SMALL.numbers(arm))["key"] for arm in SMALL.arms} == before

    def test_what_was_judged_is_judged_again_only_where_another_setting_is_chosen(self, study, tmp_path):
        copied = Journal(tmp_path / "j.jsonl")
        copied.rows = dict(study.rows)
        more = replace(SMALL, trials=5)

        def finals():
            return [task for task in tasks(more, copied) if task.kind == "final"]

        assert not finals()
        pretend(more, copied, lambda task: {"error": "it fails"})
        assert not finals()
        with pytest.raises(ValueError, match="in the journal already"):
            copied.add(study.rows["final/class/final1/lur"])
        found = "trial/class/tune/lur/3"
        made = Task("trial", "class", "tune", "lur", 3, ARMS["lur"].config(3), "lur")
        copied.rows[found] = copied.rows["truth/class/tune/0"] | made.told
        assert [task.key for task in finals()] == [f"final/class/{where}/lur" for where in FINAL]
        assert all(plan.stale(task, copied) and task.config == ARMS["lur"].config(3) for task in finals())

    def test_what_runs_with_the_defaults_of_lur_is_judged_anew_once_they_are_others(self, study, tmp_path, monkeypatch):
        grid = replace(SMALL, scenarios=("class",))
        journal = Journal(tmp_path / "j.jsonl")
        for row in study.rows.values():
            journal.add(row)
        best = study.rows["truth/class/tune/0"]
        for key in ("trial/class/tune/lur/0", *(f"final/class/{where}/lur" for where in FINAL)):
            row = best | {"key": key, "config": ARMS["lur"].config(0), "defaults": trial.defaults()}
            journal.add(row, anew=key in journal)
        now = trial.defaults()
        assert not list(tasks(grid, journal))
        monkeypatch.setattr(trial, "NoviceOrAscent", lambda: NoviceOrAscent(epochs=7.0))
        assert trial.defaults() != now
        left = [task.key for task in tasks(grid, journal)]
        assert not [key for key in left if key.startswith("final")]  # what is chosen may become another
        assert {"trial/class/tune/lur/0", "trial/class/tune/joint/lent"} <= set(left)
        assert not [key for key in left if key.startswith(("truth", "before", "original")) or "salun" in key]
        assert counted(grid, journal) == {"trial": len(left), "final": 3}
        monkeypatch.setattr(working, "ProcessPoolExecutor", Here)
        monkeypatch.setattr(working, "perform", lambda _, task: journal.rows[task.key] | task.told)
        said = []
        assert work(TINY, grid, journal, cores=2, seconds=60.0, said=said.append)
        assert len(said) == len(left) + 3
        assert all(journal.rows[f"final/class/{where}/lur"]["defaults"] != now for where in FINAL)

    @pytest.mark.parametrize("module", [LUR, targets])
    def test_other_numbers_are_other_defaults(self, module, monkeypatch):
        now = trial.defaults()
        for name, value in {"rates": {"sgd": 0.2}, "max_grad_norm": 2.0, "FEWEST": 90, "MOST": 600}.items():
            if hasattr(module, name):
                with monkeypatch.context() as patch:
                    patch.setattr(module, name, value)
                    assert trial.defaults() != now
        assert trial.defaults() == now

    def test_a_trial_that_fails_is_a_trial_and_is_not_chosen(self, tmp_path):
        config = ARMS["joint"].config(0) | {"lr": 1e30}
        failed = perform(TINY, Task("trial", "class", "tune", "joint", 0, config, "neggrad_plus"))
        assert "NonFiniteError" in failed["error"]
        assert gap(failed, FIGURES) == math.inf

    def test_the_gap_is_the_mean_distance_to_the_retrained(self):
        assert gap({"ua": 13.0, "ra": 89.0, "ta": 82.0, "mia": 50.0}, FIGURES) == pytest.approx((3 + 1 + 2 + 0) / 4)


class TestResuming:
    def test_a_run_again_does_only_what_is_missing_and_comes_to_the_same(self, study, tmp_path):
        path = tmp_path / "j.jsonl"
        first = Journal(path)
        assert go_on(SMALL, first, 20) == 20
        with path.open("a") as file:
            file.write('{"key": "trial/class/tu')  # broken off in the middle of a line
        again = Journal(path)
        assert list(again.rows) == list(first.rows)
        assert go_on(SMALL, again) == len(study.rows) - 20
        assert go_on(SMALL, Journal(path)) == 0
        took = {"cpu", "wall", "rte", "seconds"}
        for key, row in study.rows.items():
            mine = again.rows[key]
            assert {k: v for k, v in row.items() if k not in took} == {k: v for k, v in mine.items() if k not in took}

    def test_the_plan_counts_what_is_to_come(self, study, tmp_path):
        counts = counted(SMALL, Journal(tmp_path / "none.jsonl"))
        assert counts["trial"] == 2 * (3 * 3 + 1)  # the joint loss has the defaults of LUR beside
        assert counts["final"] == 2 * 3 * 3
        assert counts["before"] == 2 * 4
        assert counts["truth"] == 2 * (1 + 3 * 2)  # final splits have a second one
        assert counts["original"] == 2 * 4
        assert counted(SMALL, study) == {}

    def test_without_time_nothing_begins(self, tmp_path):
        journal = Journal(tmp_path / "j.jsonl")
        assert not work(TINY, SMALL, journal, cores=1, seconds=0.0)
        assert not journal.rows

    def test_processes_of_their_own_do_the_same(self, study, tmp_path):
        grid = replace(SMALL, scenarios=("class",), trials=1, finals=())
        journal, said = Journal(tmp_path / "j.jsonl"), []
        assert work(TINY, grid, journal, cores=2, seconds=600.0, said=said.append)
        assert len(said) == len(journal.rows) == len({line.split(":")[0] for line in said})
        row = journal.rows["trial/class/tune/salun/0"]
        assert {k: row[k] for k in FIGURES} == {k: study.rows[row["key"]][k] for k in FIGURES}

    def test_a_trained_model_is_read_from_the_cache(self):
        one, seconds = original(TINY, "class", "tune")
        other, again = original(TINY, "random10", "tune")  # trained on the same data
        assert seconds == again
        assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


class TestReport:
    def test_lines_are_means_and_deviations_over_the_final_seeds(self, study):
        line = summary.table(study, "class")["salun"]
        rows = [study.rows[f"final/class/{where}/salun"] for where in FINAL]
        values = torch.tensor([row["ua"] for row in rows], dtype=torch.float64)
        assert line["ua"].mean == pytest.approx(float(values.mean()))
        assert line["ua"].deviation == pytest.approx(float(values.std()))
        gaps = [gap(row, study.rows[f"truth/class/{where}/0"]) for row, where in zip(rows, FINAL, strict=True)]
        assert line["gap"].mean == pytest.approx(sum(gaps) / 3)
        assert line["rte"].mean > 0

    def test_a_second_retrained_model_says_how_far_truth_is_from_itself_and_judges_nobody(self, study):
        again = [gap(study.rows[f"truth/class/{where}/1"], study.rows[f"truth/class/{where}/0"]) for where in FINAL]
        lines = summary.table(study, "class")
        assert lines["retrained again"]["gap"].mean == pytest.approx(sum(again) / 3)
        assert lines["retrained"]["gap"].mean == 0.0 < sum(again)
        without = Journal(study.path)
        without.rows = {key: row for key, row in without.rows.items() if not (key[:5] == "truth" and key[-1] == "1")}
        assert summary.table(without, "class") == {k: v for k, v in lines.items() if k != "retrained again"}
        assert [task.key for task in tasks(SMALL, without)] == [
            f"truth/{scene}/{where}/1" for scene in SMALL.scenarios for where in FINAL
        ]

    def test_lur_is_shown_beside_the_nearest_of_the_others(self, tmp_path):
        off = {"lur": 2.0, "joint": 1.0, "salun": 4.0}
        spread = {"final1": 0.0, "final2": 0.4, "final3": 0.8}

        def figures(task):
            if task.kind == "truth":
                return FIGURES | {"mia": FIGURES["mia"] + 2.0 * task.number}
            more = spread.get(task.split, 0.0) if task.arm == "lur" else 0.0
            return FIGURES | {"mia": FIGURES["mia"] + 4 * (off.get(task.arm, 9.0) + more)}

        journal = pretend(replace(SMALL, scenarios=("class",)), Journal(tmp_path / "mlp-digits.jsonl"), figures)
        for row in journal.rows.values():
            Journal(journal.path).add(row)
        half = 4.302653 * 0.4 / math.sqrt(3)
        line = "| class | 2.40 ± 0.40 | joint: 1.00 ± 0.00 | +1.40 ± %.2f | 0.50 ± 0.00 | 1.0 ± 0.0 | 1.0 ± 0.0 |"
        assert sections(tmp_path)["lead"]().splitlines()[4:] == [line % half]

    def test_a_teacher_s_training_is_part_of_the_time(self, monkeypatch):
        def dear(*arguments):
            return teacher(*arguments)[0], 1000.0

        monkeypatch.setattr(trial, "teacher", dear)
        config = ARMS["joint"].config(0)
        for scene, target, least in (("class", "own", 0), ("class", "novice", 1000), ("continual", "novice", 3000)):
            task = Task("trial", scene, "tune", "joint", 0, config | {"target": target}, "neggrad_plus")
            assert least <= perform(TINY, task)["rte"] < least + 500

    def test_it_is_the_same_whether_the_model_as_given_has_to_be_trained_first(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FASTLUR_CACHE", str(tmp_path))
        clock = [0.0]

        def slow(*arguments):
            clock[0] += 1000.0
            return train(*arguments)

        train = training.train
        monkeypatch.setattr(training, "train", slow)
        monkeypatch.setattr(training.time, "process_time", lambda: clock[0])
        assert teacher(TINY, "class", "tune", 0, "novice")[1] == 0.0
        assert original(TINY, "class", "tune")[1] == 1000.0

    def test_the_call_with_three_arguments_has_the_steps_that_it_comes_with(self, monkeypatch):
        asked = []
        monkeypatch.setattr(trial.fastlur, "unlearn", lambda *_, **options: asked.append(options.get("steps")))
        for arm in ("default", "lur"):
            perform(TINY, Task("final", "continual", "tune", arm, 0, ARMS["lur"].config(0), "lur"))
        assert asked == [None] * 3 + [1] * 3

    def test_a_difference_comes_with_student_s_interval(self):
        middle, half = summary.difference([1.0, 2.0, 4.0], [0.0, 2.0, 3.0])
        assert middle == pytest.approx(2 / 3)
        assert half == pytest.approx(4.302653 * math.sqrt(1 / 3) / math.sqrt(3), rel=1e-5)

    def test_a_failed_seed_is_said_to_have_failed(self):
        assert summary.spread([1.0, None, 3.0]).shown() == "2.00 ± 1.41 (1 failed)"
        assert summary.spread([None]).shown() == "failed"

    def test_tables_and_pictures_come_from_the_journal(self, study, tmp_path, monkeypatch):
        made = {name: make() for name, make in sections(study.path.parent).items()}
        assert set(SCENARIOS) < set(made)
        assert "| retrained |" in made["class"]
        assert "attack rate" in made["backdoor"]
        assert made["random50"] == "Not measured yet."
        lines = compared(study, "class")
        assert f"| **{lines[judged(lines)[0]]['gap'].shown()}** |" in made["overview"]
        assert overview(study.path.parent, "mlp-digits") == made["overview"]
        assert overview(study.path.parent, "cnn-digits") == "Not measured yet."
        drawn, axvline = [], Axes.axvline
        monkeypatch.setattr(Axes, "axvline", lambda axes, x, **how: drawn.append(x) or axvline(axes, x, **how))
        pictures = draw(tmp_path, study.path.parent)
        assert {lines["before"]["gap"].mean, lines["retrained again"]["gap"].mean} < set(drawn)
        assert [path.name for path in pictures] == ["quality-class.png", "quality-backdoor.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)

    def test_alignment_and_targets_are_studied_at_one_setting(self, tmp_path):
        grid = Grid(("class",), {n: ALIGNMENT[n] for n in ("align-joint", "align-optimistic")}, trials=2, finals=FINAL)
        journal = Journal(tmp_path / "mlp-digits.jsonl")
        go_on(grid, journal)
        steps = [step for step, _ in journal.rows["final/class/final1/align-joint"]["cosines"]]
        assert steps == [1, 2, 3]
        few = {name: config for name, config in candidates().items() if name.endswith("optimistic")}
        go_on(Grid(("class",), settings=few), journal)
        made = sections(tmp_path)
        assert [path.name for path in draw(tmp_path, tmp_path)][-1] == "quality-cosines-mlp-digits.png"
        assert "| class |" in made["alignment"]()
        assert made["targets"]().count("| optimistic |") == len(few)
        assert not [key for key in journal.rows if key.startswith("final") and "target" in key]
        assert {f"trial/class/tune2/{name}/0" for name in few} < set(journal.rows)

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("sharpness 1.5", (1.5, 1.0)),
            ("weight 0.6, sharpness 1.3, temperature 2", (1.3, 2.0)),
            ("lr 0.03", (2.0, 1.0)),
        ],
    )
    def test_a_candidate_is_imitated_with_its_power_at_its_temperature(self, name, settings, monkeypatch):
        seen = {}
        monkeypatch.setattr(trial.fastlur, "unlearn", lambda *_, **options: seen.update(options))
        config = candidates()[f"target-novice-optimistic, {name}"]
        row = perform(TINY, Task("trial", "class", "tune", "some", 0, config, "lur"))
        assert "error" not in row and row["commit"] == commit()
        assert (seen["forget_loss"].sharpness, seen["forget_loss"].temperature) == settings

    def test_a_forget_weight_is_tried_in_every_direction(self, tmp_path):
        journal = Journal(tmp_path / "mlp-digits.jsonl")
        few = {name: config for name, config in weights().items() if name.startswith("weight-3-")}
        assert len(weights()) == len(DIRECTIONS) * len(WEIGHTS)
        go_on(Grid(("class",), settings=few), journal)
        lines = sections(tmp_path)["weights"]().splitlines()
        place = 3 + WEIGHTS.index(3.0)
        assert lines[2].split("|")[place].strip() == "3"
        for direction, line in zip(DIRECTIONS, lines[4:], strict=True):
            row = journal.rows[f"trial/class/tune/weight-3-{direction}/0"]
            assert row["config"]["method"]["forget_weight"] == 3.0
            cells = [cell.strip() for cell in line.split("|")]
            assert cells[1:3] == ["class", direction]
            assert [number for number, cell in enumerate(cells) if "±" in cell] == [place]
        assert journal.rows["trial/class/tune/weight-3-joint/0"]["config"]["method"]["inner_lr"] == 0.0
