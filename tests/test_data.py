"""Every kind of data, in a seeded order that can be resumed anywhere."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from helpers import blobs, mlp, same, state
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import fastlur
from fastlur.data import Stream, source, to_device


class Squares(Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((6,), float(i)), i % 4


class Rows(IterableDataset):
    def __iter__(self):
        return ((torch.full((6,), float(i)), i % 4) for i in range(20))


class Again:
    """A re-iterable of batches without a length, shuffled by the global random state."""

    def __iter__(self):
        for index in torch.randperm(20).split(5):
            yield index[:, None].float().expand(-1, 6), index % 4


def numbers(batches):
    return [tuple(batch[0][:, 0].long().tolist()) for batch in batches]


N = 20
VALUES = torch.arange(N, dtype=torch.float32)[:, None].expand(-1, 6).clone()
LABELS = torch.arange(N) % 4
KINDS = {
    "tensors": lambda: (VALUES, LABELS),
    "dataset": lambda: Squares(N),
    "subset": lambda: Subset(Squares(N + 5), range(N)),
    "loader": lambda: DataLoader(Squares(N), batch_size=6, shuffle=True),
    "seeded loader": lambda: DataLoader(Squares(N), 6, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "list of batches": lambda: [(VALUES[i : i + 7], LABELS[i : i + 7]) for i in range(0, N, 7)],
    "re-iterable": Again,
    "iterable dataset": Rows,
}
KIND = pytest.mark.parametrize("kind", KINDS)


def first(kind, seed, count=14, skip=0):
    stream = Stream(source(KINDS[kind](), "forget", 6), seed, skip)
    return numbers(islice(stream, count))


@KIND
def test_the_same_seed_gives_the_same_batches_and_any_place_can_be_resumed(kind):
    whole = first(kind, seed=1)
    torch.manual_seed(99)
    assert first(kind, seed=1) == whole
    for place in (1, 4, 9):
        assert first(kind, seed=1, count=14 - place, skip=place) == whole[place:]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("list of batches", "iterable dataset")])
def test_another_seed_gives_another_order(kind):
    assert first(kind, seed=1) != first(kind, seed=2)


@KIND
def test_every_item_comes_equally_often(kind):
    found = source(KINDS[kind](), "forget", 6)
    batches = 10 if kind in ("tensors", "dataset", "subset") else 3 * len(list(found.once()))
    seen = Counter(i for batch in first(kind, seed=3, count=batches) for i in batch)
    assert set(seen) == set(range(N))
    assert set(seen.values()) == {3}


def test_items_come_in_batches_of_one_size_without_repetition_within_an_epoch():
    batches = first("tensors", seed=5, count=10)
    assert {len(batch) for batch in batches} == {6}
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:N]) == sorted(flat[N : 2 * N]) == list(range(N))


def test_a_loader_keeps_its_own_batches():
    assert [len(batch) for batch in first("loader", seed=1, count=4)] == [6, 6, 6, 2]


def test_a_generator_of_the_callers_is_put_back():
    loader = KINDS["seeded loader"]()
    before = loader.generator.get_state()
    stream = Stream(source(loader, "forget", 6), seed=1)
    next(stream)
    assert not torch.equal(loader.generator.get_state(), before)
    stream.close()
    assert torch.equal(loader.generator.get_state(), before)


def test_a_run_leaves_the_callers_generator_where_it_was():
    loader = KINDS["seeded loader"]()
    before = loader.generator.get_state()
    retain = TensorDataset(torch.randn(30, 6), torch.randint(0, 4, (30,)))
    fastlur.unlearn(mlp(), loader, retain, steps=3, progress=False)
    fastlur.evaluate(mlp(), forget=loader, retain=retain, test=loader)
    assert torch.equal(loader.generator.get_state(), before)


def test_transforms_that_draw_random_numbers_are_seeded_too():
    class Noisy(Squares):
        def __getitem__(self, i):
            import random

            import numpy as np

            return torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))]), i

    def draw(seed, skip=0):
        stream = Stream(source(Noisy(9), "forget", 3), seed, skip)
        return torch.stack([next(stream)[0] for _ in range(4 - skip)])

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1)[2:], draw(1, skip=2))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("lengths", [(3, 50), (50, 3), (7, 7), (1, 9)])
def test_forget_and_retain_of_different_lengths_cycle_independently(lengths):
    x, y = blobs(sum(lengths))
    forget, retain = (x[: lengths[0]], y[: lengths[0]]), (x[lengths[0] :], y[lengths[0] :])
    seen = Counter(), Counter()

    def counts(side):
        def loss(model, batch):
            seen[side].update(batch[0][:, 0].tolist())
            return fastlur.losses.cross_entropy(model, batch)

        return loss

    fastlur.unlearn(
        mlp(),
        forget,
        retain,
        loss=counts(1),
        forget_loss=counts(0),
        method=fastlur.LUR(gradient="first_order"),
        steps=50,
        batch_size=4,
        progress=False,
    )
    for counter, n in zip(seen, lengths, strict=True):
        assert len(counter) == n
        assert max(counter.values()) - min(counter.values()) <= 4


def test_an_epoch_is_one_pass_over_the_longer_side():
    result = fastlur.unlearn(mlp(), blobs(5), blobs(33), epochs=2, batch_size=8, progress=False)
    assert len(result.history["step"]) == 2 * 5


def test_dict_batches_reach_the_model_as_keyword_arguments():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, features, scale):
            return self.body(features * scale[:, None])

    def data(n):
        x, y = blobs(n)
        return {"features": x, "scale": torch.ones(n), "labels": y}

    whole = data(12), data(30)
    batches = [[{k: v[i : i + 6] for k, v in part.items()} for i in range(0, len(part["labels"]), 6)] for part in whole]
    for forget, retain in (whole, batches):
        model = Named()
        before = state(model)
        fastlur.unlearn(model, forget, retain, steps=2, batch_size=6, progress=False)
        assert not same(before, state(model))


def test_batches_follow_the_model_to_its_device():
    batch = {"a": torch.ones(2), "b": [(torch.ones(1), "text")]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][0][0].device.type == "meta"
    assert moved["b"][0][1] == "text"


@KIND
def test_unlearn_takes_it(kind):
    model = mlp()
    before = state(model)
    retain = TensorDataset(torch.randn(30, 6), torch.randint(0, 4, (30,)))
    fastlur.unlearn(model, KINDS[kind](), retain, steps=3, batch_size=6, progress=False)
    assert not same(before, state(model))


@pytest.mark.parametrize("kind", ["tensors", "loader", "re-iterable"])
def test_same_seed_same_model_bit_for_bit_another_seed_another(kind):
    def run(seed):
        torch.manual_seed(4)
        model, retain = mlp(dropout=0.3), blobs(30)
        torch.manual_seed(int(torch.seed() % 1000))  # what the caller drew before must not matter
        result = fastlur.unlearn(model, KINDS[kind](), retain, steps=6, batch_size=6, seed=seed, progress=False)
        return state(model), result.history

    one, two, other = run(1), run(1), run(2)
    assert same(one[0], two[0])
    assert one[1] == two[1]
    assert not same(one[0], other[0])
