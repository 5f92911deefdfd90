"""A checkpoint whose checksum is in order and whose content does not fit the run: nothing of it is written anywhere."""

from __future__ import annotations

import pytest
import torch
from checkpoints import break_off, forged, forged_tensors, job
from helpers import same, state
from torch import nn

import fastlur
from fastlur.stopping import Patience

MISFITS = {
    "place in the data": lambda record: record["streams"]["retain"].update(taken=3),
    "seed": lambda record: record["streams"]["forget"].update(seed=3),
    "no streams": lambda record: record.pop("streams"),
    "rules": lambda record: record.update(rules=[]),
    "state of a rule": lambda record: record["rules"][0].pop("best"),
    "kind of a rule's state": lambda record: record.update(rules=[None]),
    "history": lambda record: record["history"].pop("cosine"),
    "length of the history": lambda record: record["history"]["lr"].pop(),
    "text in the history": lambda record: record["history"].update(lr=["a"] * 4),
    "baseline": lambda record: record.update(baseline=None),
    "infinite baseline": lambda record: record.update(baseline=float("inf")),
    "end": lambda record: record.update(ended=5),
    "random states": lambda record: record.update(random={"plain": None}),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_before_a_weight_is_written(tmp_path, case):
    rule = Patience(lambda model: 1.0, looks=99, every=1)
    options = {"stop": rule, "max_retain_loss_increase": 99.0}
    break_off(*job(tmp_path, **options))
    forged(tmp_path, MISFITS[case])
    rule.best, rule.waited = 5.0, 7
    model, data, options = job(tmp_path, **options)
    before, modes = state(model), model.training
    with pytest.raises(fastlur.CheckpointError, match="step 4 does not fit this run") as caught:
        fastlur.unlearn(model, *data, **options)
    assert "\n" not in str(caught.value)
    assert same(state(model), before)
    assert model.training == modes
    assert (rule.best, rule.waited) == (5.0, 7)


@pytest.mark.parametrize("change", ["shape", "kind"])
def test_buffers_of_another_shape_or_kind_are_refused(tmp_path, change):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))

    break_off(*job(tmp_path, model()))

    def changed(tensors):
        mean = tensors["buffer/1.running_mean"]
        tensors["buffer/1.running_mean"] = mean[:1].clone() if change == "shape" else mean.double()

    forged_tensors(tmp_path, changed)
    mine, data, options = job(tmp_path, model())
    before = state(mine)
    with pytest.raises(fastlur.CheckpointError, match=r"buffer '1\.running_mean' is"):
        fastlur.unlearn(mine, *data, **options)
    assert same(state(mine), before)
