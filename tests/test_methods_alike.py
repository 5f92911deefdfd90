"""No two methods are one method under two names, but where their docs say so."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from helpers import blobs, mlp, run
from torch import nn

from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS

NAMES = sorted(METHODS)


def bare(name, **settings):
    """The method without what it does to the weights before the first step."""
    return dataclasses.replace(METHODS[name](), trim=None, **settings)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


@pytest.fixture(scope="module")
def knowing():
    """A model with dropout and batch norm that knows its data, what it is to forget of them and what to keep."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 4))
    (x, _), rule = blobs(64), torch.randn(6, 4)
    data = x, (x @ rule).argmax(-1)
    forget, retain = (tuple(part[chosen] for part in data) for chosen in (data[1] == 0, data[1] != 0))
    run(model, blobs(1), data, method="retrain", steps=300, batch_size=32, lr=0.1)
    model.eval()
    assert all(cross_entropy(model, side) < 0.15 for side in (forget, retain))
    return model, forget, retain


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_two_methods_are_the_same_one(knowing, optimizer):
    """Six steps, one of SCRUB's max-steps among them, from one trained model that no trim has touched."""
    model, forget, retain = knowing
    updates = {}
    for name in NAMES:
        copied, settings = copy.deepcopy(model), {"reinitialise": True} if name == "retrain" else {}
        run(copied, forget, retain, method=bare(name, **settings), steps=6, lr=0.01, optimizer=optimizer)
        updates[name] = flat(copied) - flat(model)
    norms = {name: float(update.norm()) for name, update in updates.items()}
    assert not [name for name in NAMES if not norms[name] > 1e-4 * max(norms.values())]
    apart = {pair: float((updates[pair[0]] - updates[pair[1]]).norm()) for pair in itertools.combinations(NAMES, 2)}
    assert not [pair for pair in apart if not apart[pair] > 1e-4 * max(norms[each] for each in pair)]


# Methods whose first updates are the same, each with where its docs say so; all others have first updates of their own.
ALIKE = {
    ("fine_tune", "retrain"): ("retrain", "A step is a step of `fine_tune`, bit for bit"),
    ("fine_tune", "scrub"): ("scrub", "D_f has no gradient at the teacher itself"),
    ("retrain", "scrub"): ("scrub", "D_f has no gradient at the teacher itself"),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_two_methods_begin_alike_where_forgetting_and_retaining_conflict(optimizer):
    """One step, of a model without dropout and batch norm, on batches whose gradients point against each other."""
    model, (x, y) = mlp(), blobs(16)
    forget, retain = (x[:8], y[:8]), (x + 0.3 * torch.randn_like(x), y)
    run(model, blobs(1), (x, y), method="fine_tune", steps=6, batch_size=16, lr=0.1)
    assert 0.7 < cross_entropy(model, forget) < 1.38  # so that no brake holds and retraining takes it for untrained
    gradients = []
    for loss, data in ((negative_cross_entropy, forget), (cross_entropy, retain)):
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(model, data), model.parameters())]))
    assert torch.cosine_similarity(*gradients, dim=0) < -0.1
    first = {}
    for name in NAMES:
        copied, settings = copy.deepcopy(model), {"alpha": 0.5} if name == "ssd" else {}
        run(copied, forget, retain, method=bare(name, **settings), steps=1, batch_size=16, lr=0.01, optimizer=optimizer)
        first[name] = flat(copied) - flat(model)
    size = max(float(update.norm()) for update in first.values())
    for pair in itertools.combinations(NAMES, 2):
        apart = float((first[pair[0]] - first[pair[1]]).norm())
        if pair in ALIKE:
            name, said = ALIKE[pair]
            assert apart < 1e-4 * size and said in " ".join(METHODS[name].__doc__.split()), pair
        else:
            assert apart > 1e-4 * max(float(first[name].norm()) for name in pair), pair


def test_without_a_conflict_gru_begins_as_pcgrad_does():
    model, data, moved = mlp(), blobs(16), {}
    for name in ("gru", "pcgrad"):
        copied = copy.deepcopy(model)
        run(copied, data, (data[0] + 0.01, data[1]), method=name, forget_loss=cross_entropy, steps=1, batch_size=16)
        moved[name] = flat(copied)
        assert "the first update is" in " ".join(METHODS[name].__doc__.split())
    assert torch.equal(moved["gru"], moved["pcgrad"])


def test_what_looks_alike_is_alike_as_its_docs_say(knowing):
    """Retraining is fine-tuning of a fresh model, SalUn without its mask is random labels, and SCRUB is fine-tuning as
    long as the model is its teacher.
    """
    _, forget, retain = knowing
    model = mlp()
    moved = {}
    for name, steps in itertools.product(("fine_tune", "retrain", "scrub"), (1, 4)):
        copied = copy.deepcopy(model)
        run(copied, forget, retain, method=name, steps=steps, batch_size=16)
        moved[name, steps] = flat(copied) - flat(model)
    unmasked, labels = copy.deepcopy(model), copy.deepcopy(model)
    run(unmasked, forget, retain, method=bare("salun", mask=None))
    run(labels, forget, retain, method="random_label")
    assert torch.equal(flat(unmasked), flat(labels))
    assert "fine_tune" in METHODS["retrain"].__doc__
    assert all(torch.equal(moved["fine_tune", steps], moved["retrain", steps]) for steps in (1, 4))
    assert "no gradient at the teacher itself" in " ".join(METHODS["scrub"].__doc__.split())
    torch.testing.assert_close(moved["scrub", 1], moved["fine_tune", 1], rtol=1e-4, atol=1e-7)
    assert float((moved["scrub", 4] - moved["fine_tune", 4]).norm()) > 1e-3 * float(moved["fine_tune", 4].norm())
