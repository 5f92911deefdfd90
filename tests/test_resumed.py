"""What goes on with a run that is resumed, and that a state that does not fit changes nothing."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from checkpoints import break_at, break_off, forged, go_on, job
from helpers import Interrupted, Noting, blobs, mlp, of_both, same, state

import fastlur
from fastlur.stopping import Patience
from fastlur.targets import Novice, SecondChoice


class Counting:
    """A callback with a state."""

    def __init__(self, extra=0):
        self.count, self.extra = 0, extra

    def __call__(self, event):
        self.count += 1

    def state_dict(self):
        return {"count": self.count, "extra": self.extra}

    def load_state_dict(self, saved):
        self.count = saved["count"]


class TestKept:
    @pytest.mark.parametrize("steps", [4, 5])
    def test_a_rule_that_ends_a_run_at_its_last_step_does_not_keep_it_from_being_kept(self, tmp_path, steps):
        rule = lambda event: event.step == steps and "enough"
        args = job(tmp_path, keep_checkpoints=True, stop=rule, steps=steps)
        first, made = go_on(*args)
        assert made[-1] == steps
        assert (tmp_path / f"fastlur-step-0000000{steps}.json").exists()
        again, made = go_on(*args)
        assert made == []
        assert same(state(again), state(first))

    def test_nor_does_a_method_without_steps(self, tmp_path):
        args = job(tmp_path, keep_checkpoints=True, method="ssd")
        first, _ = go_on(*args)
        assert (tmp_path / "fastlur-step-00000000.json").exists()
        assert same(state(go_on(*args)[0]), state(first))

    def test_a_damaged_one_is_none_of_the_two(self, tmp_path):
        args = job(tmp_path, steps=12)
        break_off(*args, at=9)
        newest = tmp_path / "fastlur-step-00000008.safetensors"
        newest.write_bytes(newest.read_bytes()[:-9])
        model, data, options = args
        seen = []
        look = lambda event: seen.append(sorted(path.name[13:21] for path in tmp_path.glob("*.json")))
        fastlur.unlearn(copy.deepcopy(model), *data, **options, callbacks=[look])
        assert seen[0] == ["00000006"]

    def test_a_relative_directory_is_that_of_the_beginning(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "elsewhere").mkdir()
        model, data, options = job("run", keep_checkpoints=True)
        fastlur.unlearn(model, *data, **options, callbacks=[lambda event: os.chdir(tmp_path / "elsewhere")])
        assert list((tmp_path / "elsewhere").iterdir()) == []
        assert len(list((tmp_path / "run").iterdir())) == 4


class TestBeside:
    def test_seconds_are_those_of_all_calls(self, tmp_path):
        args = job(tmp_path)
        break_off(*args)
        forged(tmp_path, lambda record: record.update(seconds=record["seconds"] + 1000.0))
        model, data, options = args
        assert 1000 < fastlur.unlearn(model, *data, **options).seconds < 2000

    def test_a_state_that_cannot_be_written_is_refused_before_the_first_step(self, tmp_path):
        model, data, options = job(tmp_path)
        before, rule = state(model), Counting(torch.ones(2))
        with pytest.raises(fastlur.ArgumentError, match=r"state_dict\(\) of test_resumed\.Counting holds what JSON"):
            fastlur.unlearn(model, *data, **options, callbacks=[rule])
        assert same(state(model), before)
        assert rule.count == 0

    def test_callbacks_with_a_state_are_those_of_the_run(self, tmp_path):
        args = job(tmp_path)
        break_off(*args)
        model, data, options = args
        with pytest.raises(fastlur.CheckpointError, match=r"a state were \[\], now \['test_resumed\.Counting'\]"):
            fastlur.unlearn(model, *data, **options, callbacks=[Counting()])


def test_another_number_of_threads_is_warned_of(tmp_path):
    args = job(tmp_path)
    break_off(*args)
    forged(tmp_path, lambda record: record["here"].update(threads=99))
    with pytest.warns(UserWarning, match=r"threads was 99, now \d+; the run goes on"):
        assert go_on(*args)[1] == [5, 6, 7, 8, 9]


def test_data_that_are_not_looked_at_are_warned_of(tmp_path, monkeypatch):
    class Decoded(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.full((6,), float(index)), index % 4

    monkeypatch.setattr("fastlur.content.SAMPLE", 30)
    model, (forget, _), options = job(tmp_path, allow_overlap=True)
    with pytest.warns(UserWarning, match="checkpoint: 10 retain items are not looked at"):
        fastlur.unlearn(model, forget, Decoded(), **options)


def _numpy(record, place):
    """Another place in the state of numpy's generator, in its description."""
    states = dict(record["random"]["dict"])
    states["numpy"]["list"][2] = {"plain": place}


FORGED = {
    "a loss too large for a number": lambda record: record["history"].update(lr=[10**400] * 4),
    "a baseline too large": lambda record: record.update(baseline=10**400),
    "a state of a rule too large": lambda record: record["rules"][0].update(best=10**400),
    "seconds too large": lambda record: record.update(seconds=10**400),
    "seconds below zero": lambda record: record.update(seconds=-1.0),
    **{f"rows of {rows!r}": lambda record, rows=rows: record.update(rows=rows) for rows in (-3, 0, "x", 1.5, True)},
    "no vectors": lambda record: record.update(vectors=5),
    "a target that is none": lambda record: record.update(forget_target=["imitation"]),
    "lent statistics of some kind": lambda record: record.update(lent="own"),
    "a place outside of numpy's generator": lambda record: _numpy(record, 10**7),
    "an object": lambda record: record.update(optimizer={"py/reduce": "os.system"}),
    "a number of a tensor": lambda record: record.update(random={"dict": [["torch", {"plain": 10**400}]]}),
}


def test_what_a_model_counts_about_itself_is_no_change(tmp_path):
    torch.manual_seed(0)
    inputs, _ = blobs(40)
    data, model = (blobs(12), (inputs, inputs[:, :4].argmax(-1))), Noting()
    for target in (None, Novice(epochs=40, lr=3e-2, sharpness=1.0), SecondChoice()):
        options = {"forget_loss": target, "steps": 9, "batch_size": 8, "progress": False}
        go = lambda options=options, **more: fastlur.unlearn(model, *data, **options, **more)
        assert same(*of_both(model, go, tmp_path / str(target)))


def test_another_number_of_items_at_a_time_is_refused_by_name(tmp_path):
    model, data, options = job(tmp_path)
    break_off(model, data, options)
    before = state(model)
    with pytest.raises(fastlur.CheckpointError, match="micro_batch was None, now 4"):
        fastlur.unlearn(model, *data, **options, micro_batch=4)
    assert same(state(model), before)


def test_that_a_model_cannot_be_lent_statistics_is_known_after_a_resume():
    """It checkpoints its activations for large batches only: of itself, a small one would be lent some again."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4))
    with fastlur.MetaStep(model) as step, fastlur.MetaStep(copy.deepcopy(model)) as other:
        assert step.passes.borrows
        step.passes.borrow_no_more()
        saved = step.state_dict()
        other.load_state_dict(saved)
        assert not other.passes.borrows


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.SGD, torch.optim.AdamW])
def test_the_state_of_an_optimizer_comes_back_in_its_own_kind_of_numbers(kind, tmp_path):
    """torch's own load_state_dict would make float64 of what NAdam holds in float32."""
    data, model = (blobs(12, dtype=torch.float64), blobs(40, dtype=torch.float64)), mlp(dtype=torch.float64)

    def go(**more):
        made = kind(model.parameters(), lr=0.01)
        fastlur.unlearn(model, *data, optimizer=made, steps=9, batch_size=8, progress=False, **more)

    assert same(*of_both(model, go, tmp_path))


@pytest.mark.parametrize("case", FORGED)
def test_forged_descriptions_are_refused_and_nothing_is_changed(tmp_path, case):
    options = {"stop": Patience(lambda model: 1.0, looks=99, every=1), "max_retain_loss_increase": 99.0}
    break_off(*job(tmp_path, **options))
    forged(tmp_path, FORGED[case])
    model, data, options = job(tmp_path, **options)
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(fastlur.CheckpointError):
        fastlur.unlearn(model, *data, **options)
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_refused_resume_leaves_the_callers_optimizer_alone(tmp_path):
    def go(callbacks=()):
        model, data, options = job(tmp_path)
        made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        try:
            fastlur.unlearn(model, *data, **options, optimizer=made, callbacks=callbacks)
        finally:
            go.state = made.state_dict()["state"]

    with pytest.raises(Interrupted):
        go([break_at(5)])
    forged(tmp_path, lambda record: record.update(random={"plain": None}))
    with pytest.raises(fastlur.CheckpointError):
        go()
    assert go.state == {}
