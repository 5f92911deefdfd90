"""A captured step: what is replayed and when. Without a GPU the graph is played by running the same work again."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import blobs, mlp, same, state

import fastlur
from fastlur import capture, step

CUDA = torch.cuda.is_available()


@pytest.fixture
def recorded(monkeypatch):
    """How often something was recorded and replayed; a graph is the work itself where there is no GPU."""
    counts = {"recorded": 0, "replayed": 0}
    whole = capture.record if CUDA else lambda work: work

    def record(work):
        counts["recorded"] += 1
        replay = whole(work)

        def counted():
            counts["replayed"] += 1
            replay()

        return counted

    monkeypatch.setattr(capture, "record", record)
    if not CUDA:
        monkeypatch.setattr(step, "check_capture", lambda *_: None)
        monkeypatch.setattr(capture, "drew_random_numbers", lambda _: False)
    return counts


def moved(model, batches, **options):
    device = "cuda" if CUDA else "cpu"
    model = copy.deepcopy(model).to(device)
    losses = []
    with fastlur.MetaStep(model, lr=0.1, **options) as metastep:
        for forget, retain in batches:
            losses.append(metastep(forget, retain).retain_loss)
    return model, losses


@pytest.mark.parametrize("gradient", ["optimistic", "secant", "exact", "first_order"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_run_is_the_run(gradient, optimizer, recorded):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), mlp())
    batches = [(blobs(8), blobs(8)) for _ in range(6)]
    batches.insert(4, (blobs(5), blobs(8)))  # another shape, in the middle
    found = [moved(model, batches, gradient=gradient, optimizer=optimizer, capture=c) for c in (False, True)]
    assert recorded == {"recorded": 1, "replayed": 3}
    assert same(*(state(model) for model, _ in found))
    assert [float(x) for x in found[0][1]] == [float(x) for x in found[1][1]]  # each its own tensor


def test_batches_of_any_form_are_found_and_copied():
    a, b, c = (torch.zeros(n) for n in (1, 2, 3))
    batch = {"x": [a, (b, "text")], "y": c}
    assert [t.numel() for t in capture.tensors(batch)] == [1, 2, 3]
    again = capture.cloned(batch)
    assert again["x"][1][1] == "text"
    assert all(x is not y for x, y in zip(capture.tensors(batch), capture.tensors(again), strict=True))


def test_a_model_that_draws_is_refused(recorded, monkeypatch):
    monkeypatch.setattr(capture, "drew_random_numbers", lambda _: True)
    with pytest.raises(fastlur.ModelError, match="random numbers"):
        moved(mlp(), [(blobs(8), blobs(8))] * 4, capture=True)


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_it_is_refused_and_the_model_is_free_again():
    model = mlp()
    with pytest.raises(fastlur.ArgumentError, match="capture=True: needs a CUDA device"):
        fastlur.MetaStep(model, capture=True)
    fastlur.MetaStep(model).close()


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_an_optimizer_that_decides_on_the_host_is_refused():
    model = mlp().cuda()
    with pytest.raises(fastlur.ArgumentError, match="capture=True: needs 'sgd'"):
        fastlur.MetaStep(model, optimizer=torch.optim.SGD(model.parameters()), capture=True)
