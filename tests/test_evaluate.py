"""The metrics, against hand-made models whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import mlp, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.evaluate import membership


class Oracle(nn.Module):
    """Its input is (wanted class, confidence in it); the rest is spread evenly over 4 classes."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert not self.training
        wanted, confidence = x[:, 0].long(), x[:, 1]
        probabilities = ((1 - confidence) / 3)[:, None].repeat(1, 4)
        probabilities[torch.arange(len(x)), wanted] = confidence
        return probabilities.log()


def answers(hits, confidence, n=40):
    """n items of class 1, of which the first `hits` are recognised with this confidence."""
    said = torch.where(torch.arange(n) < hits, 1.0, 2.0)
    return torch.stack((said, torch.full((n,), confidence)), dim=1), torch.ones(n, dtype=torch.int64)


def test_accuracies():
    found = fastlur.evaluate(Oracle(), forget=answers(10, 0.9), retain=answers(40, 0.9), test=answers(30, 0.9))
    assert found.ua == pytest.approx(75)
    assert found.ra == pytest.approx(100)
    assert found.ta == pytest.approx(75)
    assert found.gap is None


def test_loss_auc_is_the_share_of_pairs_in_which_the_test_item_costs_more():
    lower, higher, between = answers(40, 0.9), answers(40, 0.5), answers(40, 0.7)
    auc = lambda forget, test: fastlur.evaluate(Oracle(), forget=forget, retain=lower, test=test).loss_auc
    assert auc(lower, higher) == 1.0
    assert auc(higher, lower) == 0.0
    assert auc(lower, lower) == 0.5
    half = tuple(torch.cat(pair) for pair in zip(lower, higher, strict=True))
    assert auc(half, between) == 0.5


def test_membership_tells_members_from_strangers_by_confidence():
    generator = np.random.default_rng(0)
    member, stranger = generator.normal(0.9, 0.02, 500), generator.normal(0.5, 0.02, 60)
    assert membership(member, stranger, np.full(10, 0.9)) == 0
    assert membership(member, stranger, np.full(10, 0.5)) == 100
    assert membership(member, stranger, np.array([0.95, 0.9, 0.5, 0.4])) == 50


def test_membership_gives_both_sides_the_same_weight():
    """Equal spreads: the border is the midpoint however many members there are."""
    generator = np.random.default_rng(1)
    member, stranger = generator.normal(0.8, 0.1, 5000), generator.normal(0.6, 0.1, 200)
    asked = np.array([0.65, 0.75])
    assert membership(member, stranger, asked) == 50


def test_membership_of_a_model_that_says_one_thing_to_all_is_defined():
    same = np.full(20, 0.25)
    assert membership(same, same, same) in (0.0, 100.0)


def test_mia_is_the_share_of_forget_items_called_non_members():
    forget = tuple(torch.cat(pair) for pair in zip(answers(40, 0.95), answers(0, 0.9, 10), strict=True))
    found = fastlur.evaluate(Oracle(), forget=forget, retain=answers(40, 0.95), test=answers(0, 0.9))
    assert found.mia == pytest.approx(20)


def test_gap_is_the_mean_distance_to_the_reference():
    data = {"forget": answers(10, 0.9), "retain": answers(40, 0.9), "test": answers(30, 0.9)}
    reference = fastlur.Evaluation(ua=70, ra=98, ta=75, mia=0.0, loss_auc=0.5)
    found = fastlur.evaluate(Oracle(), **data, reference=reference)
    assert found.gap == pytest.approx((abs(found.ua - 70) + 2 + 0 + found.mia) / 4)
    assert fastlur.evaluate(Oracle(), **data, reference=Oracle()).gap == 0


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"forget": (answers(1, 0.9)[0], torch.full((40,), 4))}, fastlur.DataError, "forget: holds labels outside"),
        ({"test": (answers(1, 0.9)[0] * float("nan"), torch.ones(40).long())}, fastlur.DataError, "test: "),
        ({"retain": (torch.ones(40), torch.ones(40).long())}, fastlur.DataError, "retain: the model cannot take"),
        ({"retain": []}, fastlur.DataError, "retain: is empty"),
        ({"batch_size": 0}, fastlur.ArgumentError, "batch_size=0"),
    ],
)
def test_bad_input_is_named_in_one_line(change, error, said):
    good = {"forget": answers(10, 0.9), "retain": answers(40, 0.9), "test": answers(30, 0.9)}
    with pytest.raises(error, match=said) as caught:
        fastlur.evaluate(Oracle(), **(good | change))
    assert "\n" not in str(caught.value)
    with pytest.raises(fastlur.ModelError, match="no torch"):
        fastlur.evaluate(5, **good)


def test_targets_that_do_not_count_do_not_count():
    class Sequences(Oracle):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    x, y = answers(40, 0.9)
    x, y = x.view(8, 5, 2), y.view(8, 5).clone()
    x[:, 3:, 0], y[:, 3:] = 2, -100  # wrong answers where nothing was asked
    found = fastlur.evaluate(Sequences(), forget=(x, y), retain=(x, y), test=(x, y))
    assert (found.ua, found.ra, found.ta) == (0, 100, 100)


def test_a_reference_of_another_kind_is_refused():
    data = answers(10, 0.9)
    with pytest.raises(fastlur.ArgumentError, match="reference: a dict"):
        fastlur.evaluate(Oracle(), forget=data, retain=data, test=data, reference={"ua": 1})


@pytest.mark.parametrize("wrap", [tuple, lambda d: TensorDataset(*d), lambda d: DataLoader(TensorDataset(*d), 7)])
def test_every_kind_of_data_gives_the_same(wrap):
    parts = answers(10, 0.9), answers(40, 0.8), answers(30, 0.7)
    names = ("forget", "retain", "test")
    plain = fastlur.evaluate(Oracle(), **dict(zip(names, parts, strict=True)))
    wrapped = fastlur.evaluate(Oracle(), **{n: wrap(d) for n, d in zip(names, parts, strict=True)}, batch_size=9)
    assert wrapped == plain


def test_the_model_is_left_alone():
    model = nn.Sequential(mlp(dropout=0.5), nn.BatchNorm1d(4)).train()
    before, random = state(model), torch.get_rng_state()
    data = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 4
    fastlur.evaluate(model, forget=data, retain=data, test=data)
    assert model.training
    assert model[0].training
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert torch.equal(torch.get_rng_state(), random)


def test_it_prints():
    found = fastlur.Evaluation(ua=12.34, ra=99, ta=98, mia=50, loss_auc=0.5, gap=1.0)
    assert str(found) == "UA 12.3  RA 99.0  TA 98.0  MIA 50.0  loss-AUC 0.500  gap 1.00"
    assert math.isclose(found.as_dict()["ua"], 12.34)
