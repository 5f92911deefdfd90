"""The state of a step: what does not fit is refused as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import blobs, mlp, same

import fastlur


def _with(path, value):
    def change(state):
        at = state
        for each in path[:-1]:
            at = at[each]
        at[path[-1]] = value

    return change


MISFITS = {
    "step": _with(["step"], "x"),
    "a step below zero": _with(["step"], -1),
    "rows": _with(["rows"], -3),
    "control": _with(["control"], None),
    "shape of the control": _with(["control"], torch.zeros(1)),
    "vectors": _with(["vectors"], 5),
    "a vector": _with(["vectors", "first_moment"], 5),
    "a tensor": _with(["vectors", "first_moment", "0.weight"], 5),
    "the last tensor": _with(["vectors", "method.inner_gradient", "0.weight"], torch.zeros(2)),
    "names of vectors": _with(["vectors", 5], {}),
    "names of parameters": _with(["vectors", "first_moment", 5], 5),
    "tensors": _with(["tensors"], None),
    "optimizer": _with(["optimizer"], {"state": 5}),
}


class TestState:
    @pytest.mark.parametrize("case", MISFITS)
    def test_what_does_not_fit_is_refused_as_a_whole(self, case):
        with fastlur.MetaStep(mlp()) as step:
            step(blobs(8), blobs(8))
            saved = copy.deepcopy(step.state_dict())
            step(blobs(8), blobs(8))
            before = step.state_dict()
            MISFITS[case](saved)
            with pytest.raises(fastlur.CheckpointError, match="state: "):
                step.load_state_dict(saved)
            now = step.state_dict()
            assert (now["step"], now["rows"]) == (before["step"], before["rows"])
            assert all(same(now["vectors"][name], before["vectors"][name]) for name in before["vectors"])
            assert torch.equal(now["control"], before["control"])

    @pytest.mark.parametrize("saved", [None, 5, [], {}])
    def test_nor_is_what_is_no_state(self, saved):
        with fastlur.MetaStep(mlp()) as step, pytest.raises(fastlur.CheckpointError, match="state: "):
            step.load_state_dict(saved)

    def test_an_optimizer_that_refuses_its_state_keeps_its_own(self):
        model = mlp()
        made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with fastlur.MetaStep(model, optimizer=made) as step:
            step(blobs(8), blobs(8))
            saved = step.state_dict() | {"optimizer": {"state": {}, "param_groups": []}}
            before = copy.deepcopy(made.state_dict()["state"])
            with pytest.raises(fastlur.CheckpointError, match="does not fit the optimizer"):
                step.load_state_dict(saved)
            now = made.state_dict()["state"]
            assert all(torch.equal(now[k]["momentum_buffer"], before[k]["momentum_buffer"]) for k in before)
