"""A model that is to run on another device comes back with the very tensors it came with if the call is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import blobs, run, same, state
from torch import nn

import fastlur
from fastlur.moving import Moved


def given():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model[2].weight.grad = torch.ones(4, 5)
    return model, held(model)


def held(model):
    """The tensors of a model, as objects and as places in memory."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(t), t.data_ptr(), str(t.device), None if t.grad is None else id(t.grad)) for name, t in tensors]


@pytest.mark.parametrize(
    "device", ["meta", torch.device("meta"), "cuda:99", "mps", "xpu", 1.5, True, "", [], 10**9, "cpu:x"]
)
def test_a_device_that_cannot_be_used_is_refused_and_the_model_is_where_it_was(device):
    if torch.cuda.is_available() and device == "cuda:99":
        pytest.skip("it might")
    model, before = given()
    values = state(model)
    with pytest.raises(fastlur.ArgumentError, match=r"device=.* cannot be used: ") as caught:
        run(model, blobs(8), blobs(20), device=device)
    assert "\n" not in str(caught.value)
    assert held(model) == before
    assert same(state(model), values)


class Elsewhere(nn.Linear):
    """Another device as far as a machine without one can tell: moving makes new tensors."""

    def _apply(self, fn, recurse=True):
        made = super()._apply(lambda tensor: fn(tensor).clone(), recurse)
        for module in self.siblings:
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.clone()
        if self.fails:
            raise RuntimeError("out of memory\nand more")
        return made


def moving(fails):
    model = nn.Sequential(Elsewhere(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    model[0].fails, model[0].siblings = fails, [model[1]]
    model[2].weight.grad = torch.ones(4, 5)
    return model


def test_where_it_has_no_room_the_model_is_where_it_was():
    model = moving(fails=True)
    before = held(model)
    with pytest.raises(fastlur.ArgumentError, match=r"device='cpu' cannot be used: out of memory$"):
        run(model, blobs(8), blobs(20), device="cpu")
    assert held(model) == before


def test_a_call_that_is_refused_later_brings_it_back(monkeypatch):
    monkeypatch.setattr("fastlur.moving._replaced", lambda now, data: True)  # as if it came from another device
    model = moving(fails=False)
    before = held(model)
    with pytest.raises(fastlur.DataError, match="forget: label"):
        run(model, (blobs(8)[0], torch.full((8,), 9)), blobs(20), device="cpu")
    assert held(model) == before
    with pytest.raises(fastlur.ArgumentError, match="lr="):
        run(model, blobs(8), blobs(20), device="cpu", lr=-1.0)
    assert held(model) == before


def test_a_run_that_begins_keeps_it_there():
    model = moving(fails=False)
    before = held(model)

    def loss(model, batch):
        return fastlur.losses.cross_entropy(model, batch) * (float("nan") if model.spoil else 1.0)

    model.spoil = False
    with pytest.raises(fastlur.NonFiniteError):
        run(
            model, blobs(8), blobs(20), device="cpu", loss=loss, callbacks=[lambda event: setattr(model, "spoil", True)]
        )
    assert [each[2] for each in held(model)] != [each[2] for each in before]
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_stays_where_it_is_is_not_held():
    model, _ = given()
    with Moved(model, "cpu") as moved:
        assert moved._parameters == moved._buffers == []


def test_ties_survive():
    model = moving(fails=True)
    model[2].bias = nn.Parameter(torch.zeros(4))
    model[2].register_parameter("again", model[2].bias)
    with pytest.raises(fastlur.ArgumentError), Moved(model, "cpu"):
        pass
    assert model[2].again is model[2].bias
