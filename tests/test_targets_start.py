"""What the model was fine-tuned from: a novice that begins there."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import blobs, learnable, mlp, run, same, state
from target_cases import QUICK, made
from torch import nn

import fastlur
from fastlur.targets import Imitation, Novice


def test_the_novice_begins_there_and_the_start_stays_as_it_is():
    model, start, retain = mlp(), mlp().requires_grad_(False), learnable(64)
    before = state(start)
    teacher = Novice(epochs=1, lr=1e-9, start=start).teacher(model, retain, batch_size=8)
    for name, value in state(teacher).items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)
    taught = Novice(epochs=20, lr=3e-2, start=start).teacher(model, retain, batch_size=8)
    assert float((taught(retain[0]).argmax(-1) == retain[1]).float().mean()) > 0.95
    assert same(before, state(start)) and not any(p.requires_grad for p in start.parameters())


def test_what_has_learned_already_serves_at_once():
    model, retain = mlp(), learnable(64)
    start = QUICK.teacher(mlp(), retain, batch_size=8)
    found = made(Novice(epochs=1, lr=1e-6, sharpness=1.5, start=start), model, blobs(12), retain)
    assert isinstance(found, Imitation) and found.sharpness == 1.5
    assert "Linear" not in repr(Novice(start=start))


@pytest.mark.parametrize("start", [mlp()[0], nn.Sequential(nn.Linear(6, 9)), nn.Identity()])
def test_one_of_another_kind_is_refused_by_name(start):
    model = mlp()
    before = state(model)
    with pytest.raises(fastlur.ArgumentError, match=r"start: is no model of this kind, by '.*(weight|bias)'"):
        run(model, blobs(12), learnable(64), forget_loss=Novice(start=start))
    assert same(before, state(model))


def test_only_what_moves_in_the_model_moves_in_the_novice():
    model, start, retain = mlp(), mlp(), learnable(64)
    model[0].weight.requires_grad_(False)
    teacher = Novice(epochs=20, lr=3e-2, start=start).teacher(model, retain, batch_size=8)
    assert torch.equal(teacher[0].weight, start[0].weight)
    assert not torch.equal(teacher[0].bias, start[0].bias)


def test_what_a_function_makes_becomes_the_novice_and_no_copy_is_made():
    made, retain = [], learnable(64)

    def start():
        made.append(mlp())
        return made[-1]

    teacher = Novice(epochs=20, lr=3e-2, start=start).teacher(mlp(), retain, batch_size=8)
    assert [teacher] == made and float((teacher(retain[0]).argmax(-1) == retain[1]).float().mean()) > 0.95
    model = mlp()
    before = state(model)
    assert Novice(epochs=2, lr=3e-2, start=lambda: model).teacher(model, retain) is not model
    assert same(before, state(model)) and all(p.requires_grad for p in model.parameters())
    for wrong, said in ((lambda: 3, "made a int"), (lambda: 1 / 0, "cannot be made")):
        with pytest.raises(fastlur.ArgumentError, match=f"start: .*{said}"):
            Novice(start=wrong).teacher(mlp(), retain)
    with pytest.raises(fastlur.ArgumentError, match="start: a int neither"):
        Novice(start=3)


def test_one_in_another_precision_is_taken_to_the_models():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    start = copy.deepcopy(model).double()
    teacher = Novice(epochs=1, start=start).teacher(model, learnable(64), batch_size=8)
    for name, value in teacher.state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
    assert {p.dtype for p in start.parameters()} == {torch.float64}
