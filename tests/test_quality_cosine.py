"""How the two gradients stand to each other is looked at as it is, and looking changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from quality import training, trial
from quality.contenders import ALIGNMENT
from quality.cosine import Cosines
from quality.trial import Task, perform
from quality_cases import FIGURES, TINY
from torch import nn

from fastlur.losses import cross_entropy
from fastlur.targets import Imitation, NoviceOrAscent


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTLUR_CACHE", str(tmp_path_factory.getbasetemp() / "quality"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(16, 5, generator=generator) + seed, torch.randint(3, (16,), generator=generator)


def event(model, step=1, steps=1):
    return SimpleNamespace(model=model, step=step, steps=steps)


def against(model, batch):
    return -cross_entropy(model, batch)


@pytest.mark.parametrize(("loss", "found"), [(cross_entropy, 1.0), (against, -1.0)])
def test_a_gradient_and_itself_are_at_no_angle_and_its_opposite_is_opposite(model, loss, found):
    looking = Cosines(batch(1), batch(1), loss)
    looking(event(model))
    assert looking.found == [(1, found)]
    assert looking.seconds > 0


def test_it_is_that_of_train_mode_and_leaves_no_trace(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    looking = Cosines(batch(1), batch(2), cross_entropy)
    looking(event(model))
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.train()
    found = [torch.autograd.grad(cross_entropy(model, batch(seed)), list(model.parameters())) for seed in (1, 2)]
    flat = [torch.cat([g.flatten() for g in each]).double() for each in found]
    assert looking.found[0][1] == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-4)


def test_it_looks_at_the_first_step_and_ten_times_more(model):
    looking = Cosines(batch(1), batch(2), cross_entropy)
    for step in range(1, 51):
        looking(event(model, step, 50))
    assert [step for step, _ in looking.found] == [1, *range(5, 51, 5)]


class TestInATrial:
    def test_a_cosine_is_that_of_the_target_that_the_run_has_made_and_looking_changes_nothing(self, monkeypatch):
        seen = []

        class Looked(Cosines):
            def _gradient(self, model, loss, batch):
                seen.append(loss)
                return super()._gradient(model, loss, batch)

        monkeypatch.setattr(trial, "Cosines", Looked)
        monkeypatch.setattr(NoviceOrAscent, "prepare", lambda *_: second_choice)
        second_choice = Imitation(training.original(TINY, "class", "tune")[0], without_truth=True)
        config = ALIGNMENT["align-optimistic"].config(0)
        rows = [perform(TINY, Task("trial", "class", "tune", n, 0, config, "lur")) for n in ("align-optimistic", "lur")]
        assert rows[0]["cosines"] and "cosines" not in rows[1]
        assert set(seen[1::2]) == {second_choice}
        assert {name: rows[0][name] for name in FIGURES} == {name: rows[1][name] for name in FIGURES}

    def test_its_time_is_not_the_method_s(self, monkeypatch):
        class Slow(Cosines):
            def __call__(self, event):
                super().__call__(event)
                self.seconds += 1000.0

        monkeypatch.setattr(trial, "Cosines", Slow)
        config = ALIGNMENT["align-joint"].config(0) | {"target": "bounded"}
        row = perform(TINY, Task("trial", "class", "tune", "align-joint", 0, config, "lur"))
        assert -3000.0 < row["rte"] < -2900.0
