"""A target says what a forget item should be answered; a novice estimates it from the retain data alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from checkpoints import forged, forged_tensors
from helpers import Interrupted, blobs, images, interrupt, learnable, mlp, run, same, state
from target_cases import QUICK, made
from torch import nn

import fastlur
from fastlur.demo import scenario
from fastlur.fresh import renew
from fastlur.losses import BoundedForgetting
from fastlur.targets import FEWEST, MOST, Imitation, Novice, NoviceOrAscent, SecondChoice


class TestNovice:
    def test_learns_the_retain_data_and_never_sees_what_is_to_be_forgotten(self):
        model, retain = mlp(), learnable(64)
        one = made(QUICK, model, blobs(12), retain)
        other = made(QUICK, model, blobs(12), retain)
        assert same(state(one.teacher), state(other.teacher))
        assert one.sharpness == 2.0
        assert float((one.teacher(retain[0]).argmax(-1) == retain[1]).float().mean()) > 0.95

    def test_knows_nothing_of_the_model_as_given(self):
        retain = learnable(64)
        model = mlp()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(3)
        first, second = (made(QUICK, each, blobs(12), retain).teacher for each in (model, other))
        assert same(state(first), state(second))
        assert not same(state(first), state(model))

    def test_is_made_the_same_in_a_run_and_beside_one_for_several(self):
        model, retain = mlp(), learnable(64)
        teacher = QUICK.teacher(model, retain, batch_size=8)
        assert same(state(teacher), state(QUICK.teacher(model, retain, batch_size=8)))
        assert not same(state(teacher), state(QUICK.teacher(model, retain, batch_size=8, seed=1)))
        assert float((teacher(retain[0]).argmax(-1) == retain[1]).float().mean()) > 0.95
        assert not teacher.training
        assert all(not p.requires_grad for p in teacher.parameters())

    def test_leaves_model_and_random_state_alone(self, cnn):
        data = images(20)
        before, drawn = state(cnn), torch.get_rng_state()
        Novice(epochs=1).teacher(cnn, data, batch_size=8)
        assert same(before, state(cnn))
        assert torch.equal(drawn, torch.get_rng_state())
        assert all(p.grad is None and p.requires_grad for p in cnn.parameters())

    def test_an_interrupted_run_goes_on_bit_for_bit(self, tmp_path):
        model, data = mlp(dropout=0.3), (learnable(12), blobs(40))
        data = data[0], learnable(40)
        twin, first = copy.deepcopy(model), copy.deepcopy(model)
        options = {"forget_loss": Novice(epochs=20, lr=3e-2), "steps": 6}
        run(twin, *data, **options)
        with pytest.raises(Interrupted):
            run(first, *data, callbacks=[interrupt], checkpoint=tmp_path, checkpoint_every=1, **options)
        run(model, *data, checkpoint=tmp_path, checkpoint_every=1, **options)
        assert same(state(model), state(twin))

    def test_a_new_head_stands_on_the_layers_as_they_are(self):
        model, retain = mlp(), learnable(64)
        teacher = Novice(epochs=20, lr=3e-2, part="head").teacher(model, retain, batch_size=8)
        changed = {name for name, value in state(teacher).items() if not torch.equal(value, state(model)[name])}
        assert changed == {"3.weight", "3.bias"}

    def test_one_that_has_learned_nothing_is_replaced_with_a_warning(self):
        model, data = mlp(), (blobs(12), learnable(64))
        twin = copy.deepcopy(model)
        with pytest.warns(UserWarning, match=r"Novice: its retain loss is .* BoundedForgetting takes its place"):
            run(model, *data, forget_loss=Novice(epochs=0.1, lr=1e-9))
        run(twin, *data, forget_loss=BoundedForgetting())
        assert same(state(model), state(twin))

    def test_parameters_that_do_not_move_are_the_model_s_own(self):
        model, retain = mlp(), learnable(64)
        model[0].weight.requires_grad_(False)
        teacher = QUICK.teacher(model, retain, batch_size=8)
        assert torch.equal(teacher[0].weight, model[0].weight)
        assert not torch.equal(teacher[0].bias, model[0].bias)

    def test_needs_the_data_of_a_run(self):
        with pytest.raises(fastlur.ArgumentError, match="unlearn"):
            fastlur.MetaStep(mlp(), forget_loss=Novice())

    @pytest.mark.parametrize(
        "wrong",
        [
            {"start": "gpt"},
            {"epochs": 0},
            {"sharpness": -1},
            {"temperature": 0},
            {"lr": 0},
            {"weight": 0},
            {"part": "tail"},
            {"part": torch.ones(2).numpy()},
        ],
    )
    def test_refuses_what_is_out_of_range(self, wrong):
        with pytest.raises(fastlur.ArgumentError, match=next(iter(wrong))):
            Novice(**wrong)

    @pytest.mark.parametrize("target", [Novice(epochs=8), SecondChoice()])
    def test_a_class_of_digits_is_forgotten_and_the_others_are_kept(self, target):
        job = scenario("class", 0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        inputs, labels = (torch.cat(pair) for pair in zip(job.forget, job.retain, strict=True))
        for _ in range(200):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
        result = run(model, job.forget, job.retain, forget_loss=target, steps=100, batch_size=128)
        found = fastlur.evaluate(result, forget=job.forget, retain=job.retain, test=job.test)
        assert found.ua > 95
        assert found.ta > 90
        assert type(target).__name__ in result.settings["forget_loss"]


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (fastlur.ModelError, {"model": 5}),
        (fastlur.ModelError, {"model": nn.Flatten()}),
        (fastlur.ModelError, {"model": mlp().requires_grad_(False)}),
        (fastlur.DataError, {"retain": 5}),
        (fastlur.ArgumentError, {"loss": 5}),
        (fastlur.ArgumentError, {"batch_size": 0}),
        (fastlur.ArgumentError, {"seed": "a"}),
    ],
)
def test_a_novice_beside_a_run_refuses_what_it_cannot_learn_from(kind, wrong):
    given = {"model": mlp(), "retain": blobs(8)} | wrong
    with pytest.raises(kind, match=next(iter(wrong))):
        Novice(epochs=1).teacher(given.pop("model"), given.pop("retain"), **given)


def test_a_model_that_cannot_be_copied_is_refused_or_climbed_away_from():
    model, forget, retain = mlp(), learnable(12), learnable(40)
    model.lock = threading.Lock()
    before = state(model)
    with pytest.raises(fastlur.ModelError, match="Sequential cannot be copied"):
        run(model, forget, retain, forget_loss=SecondChoice())
    assert same(state(model), before)
    with pytest.warns(UserWarning, match="cannot be copied.*BoundedForgetting takes its place"):
        told = run(model, forget, retain, forget_loss=QUICK).settings["forget_target"]
    assert told.startswith("BoundedForgetting(")
    assert run(model, forget, retain).settings["forget_target"] == told


class TestDefault:
    """A novice where one can be had at a bounded price, otherwise ascent that is bounded; neither with a warning."""

    @pytest.fixture(autouse=True)
    def _without_a_warning(self, recwarn):
        yield
        assert not [each for each in recwarn if "Novice" in str(each.message)]

    @staticmethod
    def learning(items, epochs=3.0):
        """The target that is made with so many retain items in batches of 8, and the steps that a novice took."""
        retain, taken = learnable(items), []

        def counting(model, batch):
            taken[-1] += model.training
            return fastlur.losses.cross_entropy(model, batch)

        for target in (BoundedForgetting(), NoviceOrAscent(epochs=epochs, lr=3e-2)):  # without one data are tried, too
            taken.append(0)
            found = made(target, mlp(), blobs(12), retain, loss=counting)
        return found, taken[1] - taken[0]

    @pytest.mark.parametrize(
        ("items", "epochs", "steps"), [(64, 3.0, FEWEST), (512, 3.0, 192), (256, 1000.0, MOST), (8, 0.5, FEWEST)]
    )
    def test_a_novice_learns_for_a_bounded_number_of_steps(self, items, epochs, steps):
        target, taken = self.learning(items, epochs)
        assert isinstance(target, Imitation)
        wanted = {name: getattr(NoviceOrAscent, name) for name in ("sharpness", "weight", "temperature")}
        assert target.settings() == wanted | {"without_truth": False}
        assert taken == steps

    def test_its_numbers_are_those_that_the_committed_rows_were_made_with(self):
        """Rows say no more of it than "default": other numbers want other rows, and another docs/quality.md."""
        default = NoviceOrAscent()
        assert (default.epochs, FEWEST, MOST, default.lr) == (6.0, 100, 500, 6e-3)
        assert (default.sharpness, default.temperature, default.weight, default.part) == (1.1, 2.0, 3.0, "all")

    def test_it_is_what_a_call_without_a_loss_takes(self):
        result = run(mlp(), blobs(12), learnable(800), steps=1)
        assert result.settings["forget_target"].startswith("Imitation(")

    def test_one_that_has_learned_little_is_not_taken(self):
        retain = blobs(64)  # whose labels mean nothing
        assert isinstance(made(NoviceOrAscent(), mlp(), blobs(12), retain), BoundedForgetting)

    def test_of_data_without_a_length_none_is_made(self):
        class Endless(torch.utils.data.IterableDataset):
            def __iter__(self):
                x, y = learnable(64)
                return iter(zip(x, y, strict=True))

        loader = torch.utils.data.DataLoader(Endless(), 8)
        assert isinstance(made(NoviceOrAscent(lr=3e-2), mlp(), blobs(12), loader), BoundedForgetting)

    def test_nor_where_the_model_takes_a_batch_in_parts(self):
        data = blobs(12), learnable(64)
        assert isinstance(made(NoviceOrAscent(lr=3e-2), mlp(), *data), Imitation)
        assert isinstance(made(NoviceOrAscent(lr=3e-2), mlp(), *data, micro_batch=4), BoundedForgetting)


@pytest.mark.parametrize(
    "target",
    [
        NoviceOrAscent(lr=3e-2),
        QUICK,
        SecondChoice(),
        NoviceOrAscent(epochs=0.1, lr=1e-9),
        Novice(epochs=20, lr=3e-2, start=mlp(dropout=0.3)),
        Novice(epochs=20, lr=3e-2, start=mlp(dropout=0.3).double()),
    ],
)
def test_a_resumed_run_goes_on_towards_the_target_that_it_had(target, tmp_path, monkeypatch):
    """It lies in the checkpoint: nothing is trained again, and where one would come to another now it is the same."""
    model, data = mlp(dropout=0.3), (learnable(12), learnable(64))
    options = {"forget_loss": target, "steps": 6, "allow_overlap": True}
    twin, first = copy.deepcopy(model), copy.deepcopy(model)
    found = run(twin, *data, **options).settings["forget_target"]
    with pytest.raises(Interrupted):
        run(first, *data, callbacks=[interrupt], checkpoint=tmp_path, checkpoint_every=1, **options)
    monkeypatch.setattr(type(target), "prepare", lambda *_: 1 / 0)
    result = run(model, *data, checkpoint=tmp_path, checkpoint_every=1, **options)
    assert same(state(model), state(twin))
    assert result.settings["forget_target"] == found


@pytest.mark.parametrize("spoil", ["kind", "sharpness", "weight", "temperature", "name", "shape"])
def test_a_forged_target_is_refused_and_nothing_is_changed(spoil, tmp_path):
    model, data = mlp(), (blobs(12), learnable(64))
    options = {"forget_loss": QUICK, "steps": 6, "checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Interrupted):
        run(copy.deepcopy(model), *data, callbacks=[interrupt], **options)
    if spoil in ("name", "shape"):
        renamed = "target/0.weights" if spoil == "name" else "target/0.weight"
        forged_tensors(tmp_path, lambda held: held.update({renamed: held.pop("target/0.weight")[:1].clone()}))
    else:
        wrong = "x" if spoil == "kind" else -1
        forged(tmp_path, lambda record: record["forget_target"].update({spoil: wrong}))
    before = state(model)
    with pytest.raises(fastlur.CheckpointError, match="does not fit this run"):
        run(model, *data, **options)
    assert same(state(model), before)


def test_the_second_choice_is_that_of_the_model_as_given():
    model = mlp()
    given = state(model)
    target = made(SecondChoice(), model, blobs(12), blobs(20))
    assert same(state(target.teacher), given)
    assert target.without_truth


def test_what_no_module_draws_anew_is_shuffled():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Parameter(torch.arange(100.0))
            self.layer = nn.Linear(9, 9)

    model = Odd()
    before = state(model)
    renew(model, list(model.parameters()))
    assert not torch.equal(model.own, before["own"])
    assert torch.equal(model.own.sort().values, before["own"])
    assert not torch.equal(model.layer.weight, before["layer.weight"])
    assert not torch.equal(model.layer.bias, before["layer.bias"])
    held = state(model)
    renew(model, [model.layer.weight])
    assert {n for n, v in state(model).items() if not torch.equal(v, held[n])} == {"layer.weight"}
