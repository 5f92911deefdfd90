"""The metrics, against hand-made models whose answers are known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import blobs, mlp, run, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.attacks import auc_interval
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
    assert membership(same, same, same) == membership(same, same, np.zeros(3)) == 50
    some = np.array([1.0, 1, 1, 0])
    assert membership(some, np.tile(some, 3), np.zeros(4)) == 50


def test_an_attack_on_a_model_that_is_always_right_and_sure_knows_no_members():
    class Sure(torch.nn.Module):
        def forward(self, x):
            return 1e4 * x

    sides = {name: (torch.eye(4), torch.arange(4)) for name in ("forget", "retain", "test")}
    found = fastlur.evaluate(Sure(), **sides)
    assert found.ra == found.ta == 100 and found.mia == 50
    assert set(found.attacks.values()) == {50.0}


def test_a_class_that_is_ruled_out_adds_nothing():
    class Masked(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.full_like(x[:, :1], -torch.inf)], -1)

    torch.manual_seed(0)
    sides = {name: (torch.randn(9, 4), torch.arange(9) % 4) for name in ("forget", "retain", "test")}
    found, plain = (fastlur.evaluate(model, **sides) for model in (Masked(), torch.nn.Identity()))
    assert found.as_dict() == plain.as_dict()


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
        ({"batch_size": True}, fastlur.ArgumentError, "batch_size=True"),
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


FIRST = """
import random, sys
import torch
import fastlur
from torch import nn
before = random.getstate()
data = torch.randn(9, 6), torch.arange(9) % 4
fastlur.evaluate(nn.Linear(6, 4), forget=data, retain=data, test=data)
assert "sklearn" in sys.modules
assert random.getstate() == before
"""


def test_the_first_call_of_a_process_draws_no_random_numbers_either():
    """An import may: parts of scikit-learn draw from Python's generator when they are loaded."""
    subprocess.run([sys.executable, "-c", FIRST], check=True, cwd=Path(fastlur.__file__).parents[1])


def test_it_prints():
    found = fastlur.Evaluation(ua=12.34, ra=99, ta=98, mia=50, loss_auc=0.5, gap=1.0)
    assert str(found) == "UA 12.3  RA 99.0  TA 98.0  MIA 50.0  loss-AUC 0.500  gap 1.00"
    assert math.isclose(found.as_dict()["ua"], 12.34)


class Says(nn.Module):
    """Its logits are its input."""

    def forward(self, x):
        return x


def said(n, sure, seed):
    """Random logits of n items, the surer of the label the larger `sure`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    logits = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return logits + sure * torch.nn.functional.one_hot(labels, 4), labels


FIELDS = {"forget": said(60, 1.0, 1), "retain": said(300, 2.0, 2), "test": said(90, 0.5, 3)}


def given_away(logits, label):
    """What the four attacks look at, for one item, in plain Python."""
    total = sum(math.exp(v) for v in logits)
    p = [math.exp(v) / total for v in logits]
    return {
        "confidence": p[label],
        "correctness": float(max(range(4), key=p.__getitem__) == label),
        "entropy": -sum(q * math.log(q) for q in p),
        "modified_entropy": -(1 - p[label]) * math.log(p[label])
        - sum(q * math.log(1 - q) for i, q in enumerate(p) if i != label),
    }


@pytest.mark.parametrize("attack", ["confidence", "correctness", "entropy", "modified_entropy"])
def test_each_attack_looks_at_one_number_of_each_item(attack):
    numbers = {
        side: np.array([given_away(*item)[attack] for item in zip(*(part.tolist() for part in data), strict=True)])
        for side, data in FIELDS.items()
    }
    found = fastlur.evaluate(Says(), **FIELDS)
    assert found.attacks[attack] == membership(numbers["retain"], numbers["test"], numbers["forget"])
    assert 0 < found.attacks[attack] < 100
    assert found.mia == found.attacks["confidence"]


def test_the_interval_is_that_of_the_forget_and_the_test_losses():
    found = fastlur.evaluate(Says(), **FIELDS)
    losses = {side: torch.nn.functional.cross_entropy(*data, reduction="none").numpy() for side, data in FIELDS.items()}
    assert found.loss_auc_interval == pytest.approx(auc_interval(losses["forget"], losses["test"]))
    low, high = found.loss_auc_interval
    assert low < found.loss_auc < high


def test_accuracy_is_given_for_every_class_of_every_side():
    wrong = answers(30, 0.9)[0], torch.tensor([1] * 20 + [3] * 20)  # the first 30 answers are 1, the others 2
    found = fastlur.evaluate(Oracle(), forget=wrong, retain=answers(40, 0.9), test=answers(10, 0.9))
    assert found.per_class == {"forget": {1: 100, 3: 0}, "retain": {1: 100}, "test": {1: 25}}


def test_every_figure_that_both_have_has_its_gap():
    reference = fastlur.evaluate(Says(), forget=FIELDS["forget"], retain=FIELDS["test"], test=FIELDS["retain"])
    found = fastlur.evaluate(Says(), **FIELDS, reference=reference)
    assert found.gaps["ua"] == 0
    assert found.gaps["ra"] == pytest.approx(abs(found.ra - found.ta))
    assert found.gaps["loss_auc"] == pytest.approx(abs(found.loss_auc - reference.loss_auc)) != 0
    assert found.gaps["attacks.entropy"] == abs(found.attacks["entropy"] - reference.attacks["entropy"]) != 0
    assert found.gaps["per_class.test.3"] == abs(found.per_class["test"][3] - found.per_class["retain"][3]) != 0
    assert len(found.gaps) == 5 + 4 + 12
    assert found.gap == pytest.approx(sum(found.gaps[name] for name in ("ua", "ra", "ta", "mia")) / 4)
    bare = fastlur.Evaluation(ua=0, ra=0, ta=0, mia=0, loss_auc=0, per_class={"test": {3: 50.0, 9: 50.0}})
    some = fastlur.evaluate(Says(), **FIELDS, reference=bare).gaps
    assert set(some) == {"ua", "ra", "ta", "mia", "loss_auc", "per_class.test.3"}


def test_what_unlearning_took_is_taken_from_its_result():
    model, data = mlp(), {"forget": blobs(12), "retain": blobs(20), "test": blobs(9)}
    result = run(model, data["forget"], data["retain"], steps=1)
    found = fastlur.evaluate(result, **data)
    assert found.seconds == result.seconds > 0
    assert fastlur.evaluate(result, **data, seconds=3).seconds == 3
    assert str(fastlur.evaluate(model, **data, seconds=2.06)).endswith("RTE 2.1 s")
    assert fastlur.evaluate(model, **data).seconds is None
    assert fastlur.evaluate(model, **data).ua == found.ua
    other = mlp()
    gaps = [fastlur.evaluate(other, **data, reference=each).gaps for each in (result, model, found)]
    assert gaps[0] == gaps[1] == gaps[2] != found.gaps
    for wrong in (-1, float("nan"), "fast"):
        with pytest.raises(fastlur.ArgumentError, match="seconds="):
            fastlur.evaluate(model, **data, seconds=wrong)


def test_a_record_of_it_is_plain_json():
    found = fastlur.evaluate(Says(), **FIELDS, reference=Says(), seconds=1.5)
    record = json.loads(json.dumps(found.as_dict()))
    assert record == found.as_dict()
    assert record["per_class"]["test"]["2"] == found.per_class["test"][2]
    assert record["loss_auc_interval"] == list(found.loss_auc_interval)
    assert (record["seconds"], record["gap"], record["gaps"]["attacks.correctness"]) == (1.5, 0, 0)
    assert f"[{found.loss_auc_interval[0]:.3f}, " in str(found)
