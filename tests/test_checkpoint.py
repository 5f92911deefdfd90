"""What is in a checkpoint, and what a run takes out of it when it goes on."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import break_off, go_on, job, whole
from helpers import Growing, Interrupted, blobs, mlp, same, state
from torch import nn

import fastlur
from fastlur.methods import SaliencyMask, Trim


def test_two_files_each_of_tensors_and_of_json_with_a_checksum(tmp_path):
    break_off(*job(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"fastlur-step-0000000{n}.{kind}" for n in (2, 4) for kind in ("json", "safetensors")]
    outer = json.loads((tmp_path / names[2]).read_bytes())
    assert set(outer) == {"fastlur", "record", "checksum"}
    assert len(outer["checksum"]) == len(outer["record"]["checksum"]) == 64


def test_everything_that_the_next_step_depends_on_is_in_it(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    names = [name for name, _ in model.named_parameters()]
    method = fastlur.LUR(mask=SaliencyMask(0.5))
    rule = fastlur.stopping.TimeBudget(1e6)
    options = {"method": method, "optimizer": "adamw", "stop": rule, "max_retain_loss_increase": 99.0}
    break_off(*job(tmp_path, model, **options))
    tensors = safetensors.torch.load_file(tmp_path / "fastlur-step-00000004.safetensors")
    assert {f"weight/{name}" for name in names} <= set(tensors)
    assert {f"buffer/{name}" for name, _ in model.named_buffers()} <= set(tensors)
    for vector in ("first_moment", "second_moment", "method.inner_gradient", "mask"):
        assert {f"vector/{vector}/{name}" for name in names} <= set(tensors)
    assert tensors["vector/mask/0.weight"].dtype == torch.bool
    assert "control" in tensors
    assert tensors["random/torch"].dtype == torch.uint8
    record = json.loads((tmp_path / "fastlur-step-00000004.json").read_bytes())["record"]
    assert len(record["history"]["retain_loss"]) == 4
    assert {side: where["taken"] for side, where in record["streams"].items()} == {"forget": 4, "retain": 4}
    assert record["streams"]["forget"]["seed"] != record["streams"]["retain"]["seed"]
    assert record["baseline"] > 0
    assert record["rules"][0]["spent"] > 0
    assert record["settings"]["seed"] == 0


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("ltu", {"method/mean", "method/spread", "method/weight0", "method/weight3"}),
        ("selective_amnesia", {"vector/method.fisher/0.weight"}),
        ("scissorhands", {"vector/method.memory0/0.weight"}),
        ("eupmu", {"vector/method.last/0.weight", "method/adam"}),
    ],
)
def test_what_methods_carry_is_in_it(tmp_path, method, names):
    break_off(*job(tmp_path, method=method))
    assert names <= set(safetensors.torch.load_file(tmp_path / "fastlur-step-00000004.safetensors"))


@pytest.mark.parametrize("what", ["mask", "attacks"])
def test_what_was_saved_counts_not_what_is_made_anew(tmp_path, monkeypatch, what):
    """On a device that sums in no fixed order, a mask or a fit that is made again may be another one."""
    args = job(tmp_path, method=fastlur.LUR(mask=SaliencyMask(0.5)) if what == "mask" else "ltu")
    break_off(*args)
    undisturbed = whole(*args)
    if what == "mask":
        everything = SaliencyMask(1.0)
        monkeypatch.setattr(SaliencyMask, "__call__", lambda _, passes: _make(everything, passes))
    else:
        monkeypatch.setattr("fastlur.membership.FITTING", 1)
    resumed, steps = go_on(*args)
    assert steps == [5, 6, 7, 8, 9]
    assert same(state(resumed), state(undisturbed))


def _make(mask, passes):
    every = passes.space.vector(torch.bool)
    for flat in every.flats:
        flat.fill_(mask.share == 1)
    return every


@pytest.mark.parametrize("method", [fastlur.LUR(trim=Trim(0.5)), fastlur.LUR(mask=SaliencyMask(0.4))])
def test_a_trimmed_or_masked_run_goes_on_bit_for_bit(tmp_path, method):
    args = job(tmp_path, method=method)
    for at in (3, 7):
        break_off(*args, at=at)
    resumed, steps = go_on(*args)
    assert steps == [7, 8, 9]
    assert same(state(resumed), state(whole(*args)))


def test_the_runs_random_states_go_on_and_the_callers_stay(tmp_path):
    def draws(into):
        return lambda event: into.append((torch.rand(()).item(), random.random(), float(np.random.rand()))) and None

    def go(callbacks, seed, **more):
        model, data, options = job(tmp_path if more else None)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        fastlur.unlearn(model, *data, **options, callbacks=callbacks)
        return before

    drawn, broken, resumed = [], [], []
    go([draws(drawn)], seed=1)
    with pytest.raises(Interrupted):
        go([draws(broken), lambda event: _raise() if event.step == 5 else None], seed=1, checkpoint=True)
    before = go([draws(resumed)], seed=2, checkpoint=True)
    assert resumed == drawn[4:]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def _raise():
    raise Interrupted


def test_buffers_that_come_and_grow_are_brought_back(tmp_path):
    args = job(tmp_path, Growing(mlp()))
    break_off(*args)
    resumed, steps = go_on(*args)
    assert steps == [5, 6, 7, 8, 9]
    assert len(resumed.log) == float(resumed.extra) == 9
    assert same(state(resumed), state(whole(*args)))


def test_kept_when_asked_for_and_the_call_then_ends_at_once(tmp_path):
    args = job(tmp_path, keep_checkpoints=True)
    first, steps = go_on(*args)
    assert steps == list(range(1, 10))
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "fastlur-step-00000008.json",
        "fastlur-step-00000009.json",
    ]
    again, steps = go_on(*args)
    assert steps == []
    assert same(state(again), state(first))
    model, data, options = args
    go_on(model, data, options | {"keep_checkpoints": False})
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_finishes_does_so_after_going_on(tmp_path):
    args = job(tmp_path, method=fastlur.methods.MOX(alpha=2.0), keep_checkpoints=True)
    break_off(*args)
    resumed, _ = go_on(*args)
    assert same(state(resumed), state(whole(*args)))
    again, steps = go_on(*args)
    assert steps == []
    assert same(state(again), state(resumed))


CHANGED = {
    "rate of an optimizer of one's own": (
        {"optimizer": lambda model: torch.optim.Adam(model.parameters(), 1e-3)},
        {"optimizer": lambda model: torch.optim.Adam(model.parameters(), 2e-3)},
        r"optimizer was .*'lr': 0.001.*, now .*'lr': 0.002",
    ),
    "dropout": ({}, {"model": lambda: mlp(dropout=0.5)}, "architecture was"),
    "rhythm of a budget's looks": (
        {"max_retain_loss_increase": 9.0},
        {"checkpoint_every": 3},
        "checkpoint_every was 2, now 3",
    ),
    "budget": ({"max_retain_loss_increase": 9.0}, {"max_retain_loss_increase": 8.0}, r"increase was 9.0, now 8.0"),
    "seed": ({}, {"seed": 3}, "seed was 0, now 3"),
    "batch size": ({}, {"batch_size": 4}, "batch_size was 8, now 4"),
    "mask": ({}, {"method": fastlur.LUR(mask=SaliencyMask(0.5))}, "method was"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_is_refused_by_name_and_nothing_is_changed(tmp_path, case):
    options, change, said = CHANGED[case]

    def call(changes, at=None):
        model, data, first = job(tmp_path)
        all_of_it = first | options | changes
        make = all_of_it.pop("model", None)
        if make is not None:
            other = make()
            other.load_state_dict(model.state_dict())
            model = other
        if callable(all_of_it.get("optimizer")):
            all_of_it["optimizer"] = all_of_it["optimizer"](model)
        before = state(model)
        callbacks = [lambda event: _raise() if event.step == at else None]
        return model, before, lambda: fastlur.unlearn(model, *data, **all_of_it, callbacks=callbacks)

    _, _, go = call({}, at=5)
    with pytest.raises(Interrupted):
        go()
    model, before, go = call(change)
    with pytest.raises(fastlur.CheckpointError, match=said) as caught:
        go()
    assert "\n" not in str(caught.value)
    assert same(state(model), before)
    _, _, go = call({})
    assert go().history["step"] == list(range(1, 10))


def test_a_refused_run_has_not_trimmed_the_model(tmp_path):
    model, data, options = job(tmp_path)
    break_off(model, data, options)
    before = state(model)
    with pytest.raises(fastlur.CheckpointError, match="forget_loss was"):
        fastlur.unlearn(model, *data, **options | {"method": "ssd"})
    with pytest.raises(fastlur.CheckpointError, match="method was"):
        fastlur.unlearn(model, *data, **options | {"method": fastlur.LUR(trim=Trim(0.1))})
    assert same(state(model), before)


def test_two_runs_do_not_share_a_directory(tmp_path):
    model, data, options = job(tmp_path)
    said = []

    def second(event):
        if event.step == 3:
            with pytest.raises(fastlur.CheckpointError, match="in use by another run") as caught:
                fastlur.unlearn(copy.deepcopy(model), blobs(8), blobs(9), **options)
            said.append(caught.value)

    fastlur.unlearn(copy.deepcopy(model), *data, **options, callbacks=[second])
    assert said
    fastlur.unlearn(copy.deepcopy(model), blobs(8), blobs(9), **options)


def test_an_optimizer_whose_state_is_no_numbers_is_refused_when_it_is_saved(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return super().state_dict() | {"secret": object()}

    model, data, options = job(tmp_path)
    with pytest.raises(fastlur.CheckpointError, match="optimizer/secret: a object cannot be written"):
        fastlur.unlearn(model, *data, **options, optimizer=Odd(model.parameters(), 0.1))
    assert list(tmp_path.iterdir()) == []
