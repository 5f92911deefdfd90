"""The likelihood-ratio attack as a whole: what it trains, what it costs, and that it tells who memorised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs, mlp
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import fastlur
from fastlur.attacks import likelihood_ratio
from fastlur.demo import MISLABELLED, digits, scenario
from fastlur.scores import scores

ITEMS = blobs(11)


class Watched:
    """A `train` that notes what it was asked for; its models count their forwards."""

    def __init__(self) -> None:
        self.asked, self.forwards = [], 0

    def __call__(self, indices):
        self.asked.append(indices)
        model = mlp()
        model.register_forward_hook(self._count)
        return model

    def _count(self, *_):
        self.forwards += 1


@pytest.mark.parametrize("count", [2, 6])
def test_it_trains_as_many_models_as_it_says_and_asks_each_once(count):
    train, model = Watched(), mlp()
    model.register_forward_hook(train._count)
    found = fastlur.likelihood_ratio_attack(model, ITEMS, train=train, count=count)
    assert len(train.asked) == found.shadows == count
    assert train.forwards == count + 1
    assert found.scores.shape == (11,) and found.online


def test_every_item_goes_into_half_of_the_shadows():
    train = Watched()
    fastlur.likelihood_ratio_attack(mlp(), ITEMS, train=train, count=10, seed=3)
    times = torch.bincount(torch.cat(train.asked), minlength=11)
    assert times.tolist() == [5] * 11
    for one, other in zip(train.asked[::2], train.asked[1::2], strict=True):
        assert sorted(one.tolist() + other.tolist()) == list(range(11))
        assert one.dtype == torch.int64 and one.tolist() == sorted(one.tolist())
        assert abs(len(one) - len(other)) == 1
    assert len({tuple(each.tolist()) for each in train.asked}) == 10  # each pair split anew


def test_the_split_depends_on_the_seed_alone():
    asked = []
    for seed in (1, 1, 2):
        train = Watched()
        np.random.seed(seed + len(asked))
        fastlur.likelihood_ratio_attack(mlp(), ITEMS, train=train, count=4, seed=seed)
        asked.append([each.tolist() for each in train.asked])
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("pooled", [None, True, False])
def test_the_scores_are_the_ratios_of_what_the_models_say(pooled):
    shadows = [(mlp(), torch.arange(11) % 2 == part) for part in (0, 1, 0, 1)]
    model = mlp()
    found = fastlur.likelihood_ratio_attack(model, ITEMS, shadows=shadows, pooled=pooled, batch_size=4)
    asked, *said = (scores(each, ITEMS, "", 64).log_odds for each in (model, *(shadow for shadow, _ in shadows)))
    wanted = likelihood_ratio(asked, said, [np.asarray(seen) for _, seen in shadows], pooled=pooled is not False)
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-4)
    assert found.shadows == 4


def test_each_item_has_a_variance_of_its_own_from_64_shadows_on():
    model, shadows = mlp(), [(mlp(), np.arange(11) % 2 == part % 2) for part in range(64)]
    attack = lambda **options: fastlur.likelihood_ratio_attack(model, ITEMS, **options).scores
    assert np.array_equal(attack(shadows=shadows), attack(shadows=shadows, pooled=False))
    assert np.array_equal(attack(shadows=shadows[:62]), attack(shadows=shadows[:62], pooled=True))


def test_shadows_that_saw_none_of_the_items_judge_offline():
    shadows = [(mlp(), np.zeros(11, bool)) for _ in range(3)]
    found = fastlur.likelihood_ratio_attack(mlp(), ITEMS, shadows=shadows)
    assert not found.online and found.shadows == 3


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(inputs, labels, seed) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
        for _ in range(30):
            for batch in torch.randperm(len(labels)).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
                optimizer.step()
    return model


@pytest.fixture(scope="module")
def audit():
    """Wrong labels that a model had memorised, and as many more that it never saw, judged by the same shadows."""
    job, (_, (images, labels)) = scenario("mislabelled", 0), digits(0)
    kept = tuple(part[:400] for part in job.retain)  # few, so that memorising takes no time
    count = len(job.forget[1])
    strangers = images[:count], (labels[:count] + torch.randint(1, 10, (count,))) % 10
    items = tuple(torch.cat(pair) for pair in zip(job.forget, strangers, strict=True))
    with_some = lambda chosen: tuple(torch.cat((all_, part[chosen])) for all_, part in zip(kept, items, strict=True))
    asked = []

    def train(indices):
        asked.append(indices)
        return trained(*with_some(indices), seed=len(asked))

    first = fastlur.likelihood_ratio_attack(trained(*kept, 98), items, train=train)
    shadows = []
    for number, indices in enumerate(asked):
        seen = torch.zeros(2 * count, dtype=torch.bool)
        seen[indices] = True
        shadows.append((trained(*with_some(indices), seed=number + 1), seen))
    return kept, items, with_some, shadows, torch.arange(2 * count) < count, first


def test_a_model_that_memorised_is_told_from_one_that_did_not(audit):
    kept, items, with_some, shadows, members, of_retrained = audit
    assert len(members) == 2 * int(MISLABELLED * 1437)
    memorised = trained(*with_some(members), seed=99)
    found = fastlur.likelihood_ratio_attack(memorised, items, shadows=shadows)
    assert found.auc(members) > 0.95
    assert found.auc_interval(members)[0] > 0.9
    assert found.true_positives(members, 0.05) > 0.5
    low, high = of_retrained.auc_interval(members)
    assert low < 0.5 < high and of_retrained.online and of_retrained.shadows == 8
    again = fastlur.likelihood_ratio_attack(trained(*kept, 98), items, shadows=shadows)
    np.testing.assert_array_equal(again.scores, of_retrained.scores)  # trained here or handed in


def test_offline_shadows_tell_them_apart_too(audit):
    """They saw other wrong labels than the ones asked about: a model with no wrong labels is surer of everything."""
    kept, items, with_some, _, members, _ = audit
    _, (images, labels) = digits(0)
    others = images[-72:], (labels[-72:] + 1) % 10
    like = lambda seed: trained(*(torch.cat(pair) for pair in zip(kept, others, strict=True)), seed)
    shadows = [(like(seed), np.zeros(len(members), bool)) for seed in (1, 2, 3)]
    worth = {
        name: fastlur.likelihood_ratio_attack(model, items, shadows=shadows).auc(members)
        for name, model in (("memorised", trained(*with_some(members), 99)), ("like the shadows", like(98)))
    }
    assert worth["memorised"] > 0.8
    assert 0.35 < worth["like the shadows"] < 0.65


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, fastlur.ArgumentError, "shadows: give either"),
        ({"train": Watched(), "shadows": []}, fastlur.ArgumentError, "shadows: give either"),
        ({"shadows": []}, fastlur.ArgumentError, "shadows=\\[\\] is empty"),
        ({"train": Watched(), "count": 3}, fastlur.ArgumentError, "count=3"),
        ({"train": Watched(), "count": 0}, fastlur.ArgumentError, "count=0"),
        ({"train": Watched(), "count": 2.0}, fastlur.ArgumentError, "count=2.0"),
        ({"shadows": [(mlp(), [True, False])]}, fastlur.ArgumentError, r"membership of shape \(2,\) for 11 items"),
        ({"shadows": [(mlp(), np.ones(11, bool))]}, fastlur.ArgumentError, "without them; train more"),
        ({"shadows": [(mlp(classes=2), np.zeros(11, bool))]}, fastlur.DataError, "outside the model's 2 logits"),
        ({"shadows": [(5, np.zeros(11, bool))]}, fastlur.ModelError, "no torch.nn.Module"),
    ],
)
def test_what_cannot_be_attacked_is_refused(options, error, said):
    with pytest.raises(error, match=said):
        fastlur.likelihood_ratio_attack(mlp(), (ITEMS[0], torch.full((11,), 3)), **options)


def test_data_without_an_order_of_their_own_are_refused():
    items = TensorDataset(*ITEMS)
    shadows = [(mlp(), np.zeros(11, bool)) for _ in range(3)]
    model = mlp()
    attack = lambda data: fastlur.likelihood_ratio_attack(model, data, shadows=shadows).scores
    for loader in (DataLoader(items, 4, shuffle=True), DataLoader(items, 4, sampler=SubsetRandomSampler(range(11)))):
        with pytest.raises(fastlur.DataError, match="shuffle=False"):
            attack(loader)
    np.testing.assert_allclose(attack(DataLoader(items, 4)), attack(items), rtol=1e-6)
