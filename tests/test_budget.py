"""What a retain budget is measured on: some items of all, drawn at random, each counted once and alike."""

from __future__ import annotations

import pytest
import torch
from helpers import blobs, mlp, run
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import fastlur
from fastlur import look
from fastlur.budget import RetainBudget
from fastlur.data import source

CPU = torch.device("cpu")
N = 400
X = torch.arange(N).float()[:, None].expand(N, 6).contiguous()
Y = torch.arange(N) * 4 // N  # in the order of their labels, as data often lie


class Streamed(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


class Decoded(Dataset):
    def __init__(self):
        self.read = []

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.read.append(i)
        return X[i], int(Y[i])


KINDS = {
    "tensors": lambda: (X, Y),
    "a dict": lambda: {"input": X, "labels": Y},
    "a data set": Decoded,
    "a loader in order": lambda: DataLoader(TensorDataset(X, Y), 8),
    "a shuffling loader": lambda: DataLoader(TensorDataset(X, Y), 8, shuffle=True),
    "a loader of part of it": lambda: DataLoader(Subset(TensorDataset(X, Y), range(N)), 8),
    "a loader with samplers of its own": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=[range(i, i + 8) for i in range(0, N, 8)]
    ),
    "a list of batches": lambda: list(zip(X.split(8), Y.split(8), strict=True)),
    "a stream": lambda: Streamed(),
    "a loader over a stream": lambda: DataLoader(Streamed(), 8),
}


def drawn(data, seed=0):
    found = look.probes(source(data, "retain", 8), seed, CPU, None)
    inputs = [batch["input"] if isinstance(batch, dict) else batch[0] for batch, _ in found]
    assert [len(each) for each in inputs] == [items for _, items in found]
    return torch.cat(inputs)[:, 0].long().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_drawn_from_all_of_them(kind):
    items = drawn(KINDS[kind]())
    assert len(items) == len(set(items)) == 64
    assert len({i * 4 // N for i in items}) == 4  # of every label, though the data are in their order
    assert drawn(KINDS[kind]()) == items
    assert drawn(KINDS[kind](), seed=1) != items


def test_only_what_is_drawn_is_decoded():
    for wrap in (lambda data: data, lambda data: DataLoader(data, 8)):
        data = Decoded()
        drawn(wrap(data))
        assert len(data.read) == 64


def test_where_there_are_few_each_counts_once():
    for data in (
        (X[:20], Y[:20]),
        DataLoader(TensorDataset(X[:20], Y[:20]), 8),
        [(X[:17], Y[:17]), (X[17:20], Y[17:20])],
    ):
        assert sorted(drawn(data)) == list(range(20))


def test_the_loss_is_that_over_the_items_not_over_the_batches():
    """Twenty items in batches of eight: the last four do not weigh as much as eight."""
    seen = []

    def loss(model, batch):
        if not model.training:
            seen.append(len(batch[0]))
            return model(batch[0]).sum() * 0 + (1.0 if len(batch[0]) == 4 else 2.0)
        return fastlur.losses.cross_entropy(model, batch)

    torch.manual_seed(0)
    result = run(mlp(), blobs(8), blobs(20), loss=loss, steps=1, lr=0.0, max_retain_loss_increase=0.0)
    assert sorted(seen[:3]) == [4, 8, 8]
    assert result.ended == "all steps done"
    budget = RetainBudget(mlp(), loss, look.probes(source(blobs(20), "retain", 8), 0, CPU, None), 0.1, 1)
    assert budget.baseline == pytest.approx((2.0 * 16 + 1.0 * 4) / 20)
