"""Inversion: it finds what was forgotten by one plain step, and nothing where there is nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import blobs, mlp, run, same, state
from test_audit_relearning import network, trained
from torch import nn

import fastlur
from fastlur.audit import inversion
from fastlur.audit.inversion import pushed_down
from fastlur.audit.matching import Matching, alignments
from fastlur.demo import digits
from fastlur.losses import cross_entropy


@pytest.fixture(scope="module")
def world():
    (images, labels), test = digits(0)
    return trained((images, labels), 0), (images, labels), test


def items(data, *index):
    return tuple(part[list(index)] for part in data)


def uphill(model, data, lr=0.1):
    """One plain step of gradient ascent."""
    mine = copy.deepcopy(model).eval()
    cross_entropy(mine, data).backward()
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter += lr * parameter.grad
    return mine


def shaken(model, seed):
    """Moved by nothing but noise."""
    mine, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return mine


class TestOneItemForgottenByOneStep:
    @pytest.mark.parametrize("index", [3, 40, 77])
    def test_it_is_reconstructed_its_label_guessed_and_it_is_told_from_all_others(self, world, index):
        model, train, _ = world
        one, others = items(train, index), items(train, *range(200, 300))
        found = inversion(model, uphill(model, one), one, others)
        assert found.label == int(one[1])
        assert found.label_right == 1
        assert found.label_chance < 0.3
        assert found.alignment == pytest.approx(1, abs=1e-3)
        assert found.alignment_auc == 1
        assert found.similarity > 0.95
        assert found.similarity_auc == 1
        assert found.similarity_noise < 0.5
        assert found.tells_items and found.shows_items
        assert torch.cosine_similarity(found.reconstructions.flatten(), one[0].flatten(), dim=0) > 0.98
        assert "can be told" in found.reading

    def test_another_item_than_the_one_forgotten_is_not_found(self, world):
        model, train, _ = world
        found = inversion(model, uphill(model, items(train, 3)), items(train, 5), items(train, *range(200, 300)))
        assert not found.shows_items
        assert not found.tells_items

    def test_going_the_other_way_is_learning_and_points_elsewhere(self, world):
        model, train, _ = world
        one = items(train, 3)
        found = inversion(model, uphill(model, one, lr=-0.1), one, items(train, *range(200, 260)), iterations=5)
        assert found.alignment == pytest.approx(-1, abs=1e-3)
        assert found.label != int(one[1])

    def test_of_several_forgotten_together_each_is_told(self, world):
        model, train, _ = world
        wrong = train[0], (train[1] + 1) % 10
        gone = items(wrong, *range(8))
        found = inversion(model, uphill(model, gone), gone, items(wrong, *range(200, 300)), count=2, iterations=20)
        assert found.alignment_auc > 0.8
        assert found.tells_items
        assert found.reconstructions.shape == (2, 1, 8, 8)


class TestNothingForgotten:
    def test_noise_gives_nothing_away(self, world):
        model, train, _ = world
        told, similar, right = [], [], []
        for seed in range(4):
            gone, new = items(train, *range(seed * 50, seed * 50 + 50)), items(train, *range(300, 350))
            found = inversion(model, shaken(model, seed), gone, new, iterations=40, noises=1, seed=seed)
            told.append(found.tells_items), similar.append(found.similarity_auc)
            right.append(found.label_right - found.label_chance)
        assert sum(told) <= 1
        assert np.mean(similar) == pytest.approx(0.5, abs=0.1)
        assert np.mean(right) == pytest.approx(0, abs=0.08)

    def test_the_same_weights_say_so(self, world):
        model, train, _ = world
        found = inversion(model, model, items(train, *range(9)), items(train, *range(30, 50)), iterations=3)
        assert found.moved == 0
        assert found.label is None
        assert (found.alignment, found.alignment_auc) == (0, 0.5)
        assert not found.tells_items
        assert "nothing to see" in found.reading


class TestTheParts:
    def test_alignments_are_cosines_of_gradients(self):
        model, data = mlp(dtype=torch.float64), blobs(5, dtype=torch.float64)
        change = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        found = alignments(model, [change, {n: -d for n, d in change.items()}], data)
        whole = torch.cat([d.flatten() for d in change.values()])
        for i in range(5):
            model.zero_grad()
            nn.functional.cross_entropy(model(data[0][i : i + 1]), data[1][i : i + 1]).backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert found[i, 0] == pytest.approx(float(torch.cosine_similarity(gradient, whole, dim=0)))
            assert found[i, 1] == pytest.approx(-found[i, 0])

    def test_labels_come_from_the_last_bias_or_else_the_rows_of_the_last_weight(self):
        change = {"w": torch.zeros(4, 6), "v": torch.tensor([[1.0, 2], [-3, -4]]), "b": torch.tensor([0.5, -2.0])}
        assert pushed_down(change, 2).tolist() == [-0.5, 2.0]
        del change["b"]
        assert pushed_down(change, 2).tolist() == [-3.0, 7.0]
        assert pushed_down(change, 5) is None

    def test_similarity_is_a_cosine_about_the_mean_item(self):
        gone, new = blobs(6, dtype=torch.float64), blobs(9, dtype=torch.float64)
        matching = Matching(mlp(dtype=torch.float64), gone, new, 1, 0.1, 0.0)
        found = matching.similarity(gone[0][:2], gone)
        middle = (gone[0].mean(0) + new[0].mean(0)) / 2
        a, b = gone[0] - middle, gone[0][:2] - middle
        expected = torch.cosine_similarity(a[:, None], b[None], dim=-1).max(1).values
        assert found.tolist() == pytest.approx(expected.tolist())
        assert found[:2].tolist() == pytest.approx([1, 1])

    def test_a_model_without_bias_is_attacked_by_its_weight(self, world):
        _, train, _ = world
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10, bias=False))
        one = items(train, 3)
        found = inversion(model, uphill(model, one), one, items(train, *range(20, 40)), iterations=3)
        assert found.label == int(one[1])


class TestWhatItLeavesAlone:
    def test_models_random_state_and_grad_mode(self, world):
        model, train, _ = world
        model = copy.deepcopy(model).train()
        after = shaken(model, 0)
        before = [state(model), state(after), {"random": torch.get_rng_state()}]
        with torch.no_grad():
            call = lambda: inversion(model, after, items(train, 1, 2), items(train, 5, 6), iterations=2, noises=1)
            one, two = call(), call()
        assert torch.equal(one.reconstructions, two.reconstructions)
        assert one.alignment_noise == two.alignment_noise
        now = [state(model), state(after), {"random": torch.get_rng_state()}]
        assert all(same(a, b) for a, b in zip(before, now, strict=True))
        assert model.training
        assert all(p.grad is None for p in (*model.parameters(), *after.parameters()))

    def test_a_result_is_taken(self):
        model, forget, retain = mlp(), blobs(8), blobs(9)
        before = copy.deepcopy(model)
        result = run(model, forget, retain)
        assert inversion(before, result, forget, retain, iterations=2, noises=1).moved > 0


class Twice(torch.autograd.Function):
    """Differentiable once only."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, slope):
        if torch.is_grad_enabled():
            raise RuntimeError("once only")
        return slope * 2


class Once(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(6, 4)

    def forward(self, x):
        return Twice.apply(self.inside(x))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"count": 0}, fastlur.ArgumentError, "count"),
        ({"iterations": 1.5}, fastlur.ArgumentError, "iterations"),
        ({"lr": -1.0}, fastlur.ArgumentError, "lr"),
        ({"smooth": float("nan")}, fastlur.ArgumentError, "smooth"),
        ({"noises": 0}, fastlur.ArgumentError, "noises"),
        ({"candidates": 1}, fastlur.ArgumentError, "candidates"),
        ({"before": 5}, fastlur.ModelError, "before"),
        ({"after": 5}, fastlur.ModelError, "after"),
        ({"after": mlp(classes=5)}, fastlur.ModelError, "other parameters"),
        ({"before": Once(), "after": Once()}, fastlur.ModelError, "differentiated twice"),
        ({"forget": []}, fastlur.DataError, "empty"),
        ({"forget": blobs(4, inputs=5)}, fastlur.DataError, "forget"),
        ({"others": blobs(4, inputs=5)}, fastlur.DataError, "others"),
        (
            {"others": (torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))},
            fastlur.DataError,
            "floating",
        ),
        ({"forget": (torch.randn(3, 6), torch.full((3,), 9))}, fastlur.DataError, "outside"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_the_package(change, error, said):
    call = {"before": mlp(), "after": mlp(), "forget": blobs(3), "others": blobs(4), "iterations": 1, "noises": 1}
    with pytest.raises(error, match=said):
        inversion(**call | change)


def test_networks_of_the_tests_learn_the_digits(world):
    model, _, test = world
    assert float((model(test[0]).argmax(-1) == test[1]).double().mean()) > 0.9
    assert network(0)[1].in_features == 64
