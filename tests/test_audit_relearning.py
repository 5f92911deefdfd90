"""Relearning: quick where something was only hidden, no quicker than elsewhere where nothing was known."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import blobs, mlp, run, same, state
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.audit import relearning
from fastlur.demo import digits
from fastlur.losses import cross_entropy
from fastlur.world import derive

GONE = 3


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))


def trained(data, seed):
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        for batch in torch.randperm(len(data[1])).split(64):
            optimizer.zero_grad()
            cross_entropy(model, (data[0][batch], data[1][batch])).backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def world():
    """A class to forget: the data of both sides, the model that knows it, and three that never did."""
    (images, labels), _ = digits(0)
    gone = labels == GONE
    forget, retain = (images[gone], labels[gone]), (images[~gone], labels[~gone])
    return forget, retain, trained((images, labels), 0), [trained(retain, seed) for seed in (1, 2, 3, 4)]


def hidden(model):
    """The class is never the answer, and all that is known of it is still there."""
    mine = copy.deepcopy(model)
    mine[-1].bias.data[GONE] -= 12.0
    return mine


class TestWhatItFinds:
    def test_what_was_only_hidden_comes_back_faster_than_it_is_learned(self, world):
        forget, retain, model, truths = world
        found = relearning(hidden(model), forget, retrained=truths, original=model, retain=retain, lr=0.02)
        assert found.accuracy["unlearned"][0] == 0
        assert found.advantage > 10
        assert found.comes_back
        assert "comes back faster" in found.reading

    def test_a_model_that_never_knew_is_no_faster_than_its_like(self, world):
        forget, retain, _, truths = world
        for one in range(4):
            others = truths[:one] + truths[one + 1 :]
            found = relearning(truths[one], forget, retrained=others, retain=retain, lr=0.05)
            assert not found.comes_back
            assert "no faster" in found.reading
            assert found.accuracy["unlearned"][0] == 0

    def test_where_nothing_was_forgotten_all_is_there_at_once(self, world):
        forget, _, model, truths = world
        found = relearning(model, forget, retrained=truths, original=model)
        assert found.accuracy["unlearned"] == found.accuracy["original"]
        assert found.accuracy["unlearned"][0] > 95
        assert found.comes_back

    def test_without_a_retrained_model_there_is_no_verdict(self, world):
        forget, _, model, _ = world
        found = relearning(model, forget, draws=1)
        assert (found.advantage, found.error, found.comes_back) == (None, None, None)
        assert "says little" in found.reading

    def test_one_draw_and_one_retrained_model_give_no_verdict_and_few_a_careful_one(self, world):
        forget, _, model, truths = world
        assert relearning(model, forget, retrained=truths[0], draws=1).comes_back is None
        found = relearning(model, forget, retrained=truths[:2], draws=2)
        careful = [dataclasses.replace(found, advantage=9.0, error=3.0, freedom=n).comes_back for n in (1, 2, 9)]
        assert careful == [False, False, True]


class TestTheFigures:
    def test_they_are_those_of_plain_descent_on_the_items_shown(self):
        torch.manual_seed(5)
        model, data = mlp(dropout=0.5, dtype=torch.float64), blobs(20, dtype=torch.float64)
        found = relearning(model, data, share=0.25, steps=(2, 3), lr=0.1, momentum=0.8, draws=1, seed=7)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(derive(7, "shown", 0)))
        shown, rest = ((data[0][i], data[1][i]) for i in (order[:5], order[5:]))
        mine = copy.deepcopy(model).eval()
        optimizer = torch.optim.SGD(mine.parameters(), 0.1, momentum=0.8)
        losses, right = [], []
        for step in range(4):
            if step != 1:
                losses.append(cross_entropy(mine, rest).item())
                right.append(100 * float((mine(rest[0]).argmax(-1) == rest[1]).double().mean()))
            optimizer.zero_grad()
            cross_entropy(mine, shown).backward()
            optimizer.step()
        assert found.steps == (0, 2, 3)
        assert (found.shown, found.rest) == (5, 15)
        assert found.loss["unlearned"] == pytest.approx(losses)
        assert found.accuracy["unlearned"] == pytest.approx(right)

    def test_the_advantage_is_the_mean_over_steps_draws_and_models(self, world):
        forget, _, model, truths = world
        options = {"steps": (1, 4, 9), "draws": 2, "lr": 0.03}
        every = [relearning(model, forget, retrained=truth, **options) for truth in truths]
        both = relearning(model, forget, retrained=truths, **options)
        assert both.advantage == pytest.approx(sum(one.advantage for one in every) / 4)
        assert both.accuracy["retrained"][2] == pytest.approx(sum(one.accuracy["retrained"][2] for one in every) / 4)
        one = every[0]
        by_step = [a - b for a, b in zip(one.accuracy["unlearned"], one.accuracy["retrained"], strict=True)]
        assert one.advantage == pytest.approx(sum(by_step[1:]) / 3)
        assert both.error > max(each.error for each in every)  # that of another training is in it

    def test_the_same_call_finds_the_same_and_another_seed_something_else(self, world):
        forget, retain, model, truths = world
        call = lambda seed: relearning(hidden(model), forget, retrained=truths, retain=retain, draws=2, seed=seed)
        assert call(3) == call(3)
        assert call(3) != call(4)


class TestWhatItLeavesAlone:
    def test_models_random_state_and_grad_mode(self, world):
        forget, retain, model, truths = world
        model, truth = copy.deepcopy(model).train(), copy.deepcopy(truths[0])
        model[1].weight.requires_grad_(False)
        before = [state(model), state(truth), {"random": torch.get_rng_state()}]
        with torch.no_grad():
            relearning(model, forget, retrained=truth, retain=retain, draws=1)
            assert not torch.is_grad_enabled()
        after = [state(model), state(truth), {"random": torch.get_rng_state()}]
        assert all(same(a, b) for a, b in zip(before, after, strict=True))
        assert model.training and not model[1].weight.requires_grad
        assert all(p.grad is None for p in model.parameters())

    def test_results_loaders_and_dicts_are_taken(self):
        forget, retain = blobs(12), blobs(20)
        result = run(mlp(), forget, retain)
        plain = relearning(result.model, forget, retain=retain, draws=1)
        loader = DataLoader(TensorDataset(*forget), 5)
        assert relearning(result, loader, retain=TensorDataset(*retain), draws=1) == plain

        class Named(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = result.model

            def forward(self, x):
                return self.inside(x)

        as_dict = {"x": forget[0], "labels": forget[1]}
        named = relearning(Named(), as_dict, retain={"x": retain[0], "labels": retain[1]}, draws=1)
        assert named.accuracy == plain.accuracy


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"share": 1.0}, fastlur.ArgumentError, "share"),
        ({"share": "half"}, fastlur.ArgumentError, "share"),
        ({"steps": ()}, fastlur.ArgumentError, "steps"),
        ({"steps": (3, 2)}, fastlur.ArgumentError, "steps"),
        ({"steps": (0, 2)}, fastlur.ArgumentError, "steps"),
        ({"lr": 0.0}, fastlur.ArgumentError, "lr"),
        ({"lr": 1e39}, fastlur.ArgumentError, "diverged"),
        ({"momentum": 1.0}, fastlur.ArgumentError, "momentum"),
        ({"batch_size": 0}, fastlur.ArgumentError, "batch_size"),
        ({"draws": 0}, fastlur.ArgumentError, "draws"),
        ({"model": "none"}, fastlur.ModelError, "unlearned"),
        ({"retrained": ["none"]}, fastlur.ModelError, "retrained"),
        ({"forget": blobs(1)}, fastlur.DataError, "one item"),
        ({"forget": []}, fastlur.DataError, "empty"),
        ({"forget": torch.randn(4, 6)}, fastlur.DataError, "labelled"),
        ({"forget": (torch.randn(4, 6), torch.randn(4))}, fastlur.DataError, "labelled"),
        ({"forget": blobs(4, inputs=5)}, fastlur.DataError, "cannot take"),
        ({"forget": [("a", "b")]}, fastlur.DataError, "one batch"),
        ({"retain": {"x": torch.randn(4, 6), "labels": torch.zeros(4, dtype=torch.int64)}}, fastlur.DataError, "kind"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_the_package(change, error, said):
    with pytest.raises(error, match=said):
        relearning(**{"model": mlp(), "forget": blobs(8)} | change)
