"""The protocol of the study: who sees what, what is forgotten, and that every method has the same chances."""

from __future__ import annotations

import json

import pytest
import torch
from quality.contenders import ALIGNMENT, ARMS, ESSENTIAL, INNER, WEIGHED
from quality.journal import Journal
from quality.networks import NETWORKS
from quality.plan import GRIDS
from quality.points import DIMENSIONS, cube
from quality.scenarios import CLASS, POISONED, SCENARIOS, scenario
from quality.splits import DATASETS, FINAL, SPLITS, TUNING, indices, split
from quality.training import Bench, train
from quality.trial import assembled
from quality_cases import pretend

from fastlur.methods import METHODS


class TestSplits:
    @pytest.mark.parametrize("dataset", DATASETS)
    def test_nothing_is_trained_on_and_tested_with(self, dataset):
        for name in SPLITS:
            train, test = (set(part.tolist()) for part in indices(dataset, name))
            assert train
            assert test
            assert not train & test

    @pytest.mark.parametrize("dataset", DATASETS)
    def test_tuning_sees_nothing_that_a_final_seed_is_tested_with(self, dataset):
        seen = set().union(*(part.tolist() for name in TUNING for part in indices(dataset, name)))
        for name in FINAL:
            assert not seen & set(indices(dataset, name)[1].tolist())

    def test_mnist_has_enough_for_every_split_to_have_images_of_its_own(self):
        parts = [set(part.tolist()) for name in SPLITS for part in indices("mnist", name)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 70_000
        assert all(len(indices("mnist", name)[0]) == 10_000 for name in SPLITS)


@pytest.fixture(scope="module")
def jobs():
    return {name: scenario(name, split("digits", "final1"), "final1") for name in SCENARIOS}


class TestScenarios:
    @pytest.mark.parametrize("name", SCENARIOS)
    def test_forget_and_retain_are_all_that_was_trained_on(self, name, jobs):
        job = jobs[name]
        parts = [item.numpy().tobytes() for images, _ in (*job.requests, job.retain) for item in images]
        assert sorted(parts) == sorted(item.numpy().tobytes() for item in job.trained_on[0])
        assert len(job.trained_on[1]) == 1437

    def test_they_are_what_they_are_called(self, jobs):
        assert len(jobs["random10"].forget[1]) == 143
        assert len(jobs["random50"].forget[1]) == 718
        gone = jobs["class"]
        assert set(gone.forget[1].tolist()) == {CLASS}
        assert CLASS not in {*gone.retain[1].tolist(), *gone.test[1].tolist()}
        half = jobs["half_class"]
        kept = int((half.retain[1] == CLASS).sum())
        assert set(half.forget[1].tolist()) == {CLASS}
        assert abs(kept - len(half.forget[1])) <= 1
        assert CLASS in half.test[1].tolist()

    def test_labels_are_wrong_where_they_are_said_to_be(self, jobs):
        images, labels = split("digits", "final1").train
        true = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
        job = jobs["mislabelled"]
        assert len(job.forget[1]) == 71
        assert all(true[i.numpy().tobytes()] != int(y) for i, y in zip(*job.forget, strict=True))
        assert all(true[i.numpy().tobytes()] == int(y) for i, y in zip(*job.retain, strict=True))

    def test_the_trigger_is_on_what_is_to_be_forgotten_and_on_victims_only(self, jobs):
        job = jobs["backdoor"]
        corner = (..., slice(-3, -1), slice(-3, -1))
        for images, labels in (job.forget, job.triggered):
            assert bool((images[corner] == 1).all())
            assert set(labels.tolist()) == {POISONED}
        assert len(job.triggered[1]) == int((job.test[1] != POISONED).sum())
        assert not (job.retain[0][corner] == 1).all(-1).all(-1).any()

    def test_requests_come_one_after_another(self, jobs):
        job = jobs["continual"]
        assert len(job.requests) == 3
        assert set(job.requests[1][1].tolist()) == {CLASS}
        sizes = [len(job.retain_at(number)[1]) for number in range(3)]
        assert sizes[2] == len(job.retain[1])
        assert sizes[0] - sizes[1] == len(job.requests[1][1])
        assert sizes[1] - sizes[2] == len(job.requests[2][1])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_network_takes_every_data_set_and_learns(network, dataset):
    bench = Bench(network, dataset, size=64, epochs=20)
    side = 28 if dataset == "mnist" else 8
    labels = torch.arange(64) % 4
    images = torch.rand(64, 1, side, side) * 0.1 + (labels / 4)[:, None, None, None]
    model = train(bench, (images, labels), "a seed").train()
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (64, 10)
    assert float(torch.nn.functional.cross_entropy(logits, labels)) < 1.8  # guessing: 2.3


def as_run(method, config):
    """What of a run the method does not decide, with what the package fills in."""
    options = assembled(method, config)
    made = options["method"]
    own = options.get("forget_loss") or made.default_forget_loss("classification")
    return {
        "forget_loss": "novice" if config["target"] == "novice" else own,
        "lr": options.get("lr") or made.rates["sgd"],
        "schedule": options["schedule"],
        "max_grad_norm": options.get("max_grad_norm", made.max_grad_norm),
        "normalize_by": made.normalize_by,
        "forget_weight": config["method"].get("forget_weight", made.forget_weight if method == "lur" else None),
        "trim": config["trim"],
        "mask": config["mask"],
    }


class TestFairness:
    def test_every_method_but_retraining_contends(self):
        assert {arm.method for arm in ARMS.values()} == set(METHODS) - {"retrain"}
        assert set(ESSENTIAL) <= set(ARMS)
        assert len(ESSENTIAL) >= 8

    @pytest.mark.parametrize("grid", ["essential", "full", "alignment"])
    def test_every_contender_has_the_same_trials_and_is_judged_on_the_same_seeds(self, grid, tmp_path):
        journal = pretend(GRIDS[grid], Journal(tmp_path / "j.jsonl"))
        for place in ("trial", "final"):
            count = {}
            for key in journal.rows:
                kind, scene, where, *rest = key.split("/")
                if kind == place:
                    assert (where == "tune") == (kind == "trial")
                    count[scene, rest[0]] = count.get((scene, rest[0]), 0) + 1
            for (_, name), made in count.items():  # nobody has less than LUR; what can take its defaults has these too
                assert made == (len(GRIDS[grid].numbers(name)) if place == "trial" else 3)
                assert made >= count[SCENARIOS[0], "lur" if "lur" in GRIDS[grid].arms else "align-joint"]
            assert len(count) == len(SCENARIOS) * len(GRIDS[grid].arms)

    @pytest.mark.parametrize("name", [*ARMS, *ALIGNMENT])
    def test_the_first_trial_is_the_default_and_the_others_are_common_points(self, name):
        arm = {**ARMS, **ALIGNMENT}[name]
        assert len(arm.knobs) <= 2
        first = arm.config(0)
        assert arm.like_lur or first == {
            "method": dict(arm.fixed), "target": "own", "trim": None, "mask": None, "lr": None, "schedule": "linear"
        }  # fmt: skip
        for number in range(1, 33):
            config, u = arm.config(number), cube(number)
            assert json.loads(json.dumps(config)) == config
            for place, knob in enumerate(arm.knobs):
                value = config[knob.name] if knob.name in ("trim", "mask") else config["method"][knob.name]
                assert value == knob.at(u[1 + place])
                assert knob.low * 0.99 <= value <= knob.high * 1.01
            assert (config["schedule"] == "linear") == (u[5] < 0.75)
            if arm.lr is not None:
                assert arm.lr[0] * 0.99 <= config["lr"] <= arm.lr[1] * 1.01
            assert isinstance(assembled(arm.method, config)["method"], METHODS[arm.method])

    def test_lur_in_the_space_of_the_joint_loss_has_its_weights_rates_and_targets(self):
        for number in range(1, 33):
            joint, lur = (WEIGHED[name].config(number) for name in ("joint", "weighed-optimistic"))
            share = joint["method"].pop("retain_weight")
            assert lur["method"].pop("forget_weight") == pytest.approx((1 - share) / share, rel=0.01)
            assert lur["method"].pop("inner_lr") == INNER.at(cube(number)[2])
            assert lur["method"].pop("relative_inner_lr")
            assert lur == joint

    @pytest.mark.parametrize("name", ARMS)
    def test_what_is_offered_to_one_is_offered_to_all_that_can_take_it(self, name):
        arm, recipe = ARMS[name], METHODS[ARMS[name].method]
        many = [arm.config(number) for number in range(1, 33)]
        assert arm.open == (not recipe.own_objective)
        assert {config["target"] for config in many} == ({"own", "novice"} if arm.open else {"own"})
        for part in ("trim", "mask"):
            values = {config[part] for config in many}
            takes = not (name == "ssd" and part == "mask")
            assert (len(values) > 1) == takes, part
        assert {config["schedule"] for config in many} == {"linear", "constant"}

    def test_points_fill_the_cube(self):
        points = torch.tensor([cube(number) for number in range(1, 9)])
        assert points.shape == (8, DIMENSIONS)
        assert all(sorted((column * 8).long().tolist()) == list(range(8)) for column in points.T)

    def test_ways_to_align_differ_in_the_direction_alone(self):
        """As they are run: with what the package fills in where a setting says nothing."""
        for number in range(9):
            found = [as_run(arm.method, arm.config(number)) for arm in ALIGNMENT.values()]
            assert all(each == found[0] for each in found)

    @pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.open and name != "lur"])
    def test_what_takes_a_forget_loss_is_tried_with_the_defaults_of_lur(self, name):
        arm = ARMS[name]
        assert arm.numbers(3) == [0, 1, 2, "lent"]
        lent, lur = as_run(arm.method, arm.config("lent")), as_run("lur", ARMS["lur"].config(0))
        assert lent.pop("forget_weight") in (lur.pop("forget_weight"), None)
        share = 1.0
        if name == "joint":  # its weights are w and 1 − w, so that its direction is shorter by w
            share = arm.config("lent")["method"]["retain_weight"]
            assert (1 - share) / share == pytest.approx(0.3)
        assert lent.pop("lr") * share == pytest.approx(lur.pop("lr"))
        assert lent.pop("max_grad_norm") == pytest.approx(lur.pop("max_grad_norm") * share)
        assert lent == lur
        assert ARMS["lur"].numbers(3) == [0, 1, 2]
