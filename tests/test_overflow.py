"""No model is lost to an update that overflows, nor to what a method writes before the first step or after the last.

An update that might make a weight infinite is not made: a bound decides, as a copy to go back to would cost a vector.
"""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress

import pytest
import torch
from helpers import blobs, mlp, run, same, state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlur
from fastlur.methods import METHODS
from fastlur.operands import control_scalars, hyper_parameters
from fastlur.reach import Reach
from fastlur.step import Step
from fastlur.update import Update

STEPPING = [name for name in sorted(METHODS) if METHODS[name].steps != 0 and name != "retrain"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_an_update_that_would_overflow_is_not_made(kind, optimizer):
    model = mlp(dtype=kind)
    beyond = {torch.float16: 1e7, torch.float64: 1e308}.get(kind, 1e38)
    losses = {"retain": fastlur.losses.cross_entropy, "forget": fastlur.losses.negative_cross_entropy}
    with Step(model, fastlur.LUR(gradient="first_order"), losses, optimizer=optimizer, lr=1e-3) as step:
        torch.manual_seed(1)
        for _ in range(3):
            (x, y), (u, v) = blobs(8), blobs(8)
            step((x.to(kind), y), (u.to(kind), v))
        before = state(model)
        step.update.set_lr(beyond)
        with pytest.raises(fastlur.NonFiniteError, match="step 4: the update would overflow") as caught:
            step((x.to(kind), y), (u.to(kind), v))
        assert same(state(model), before)
        assert caught.value.step == 4
        assert caught.value.tensor in dict(model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", STEPPING)
def test_of_every_method_the_model_is_as_after_the_last_good_step(name):
    """A step at a rate beyond all reason: refused, or too small to do harm."""
    model, good = mlp(), []

    class Jump(torch.optim.SGD):
        def step(self, closure=None):
            if len(good) == 2:
                self.param_groups[0]["lr"] = 1e38
            super().step(closure)
            super().step(closure)

    optimizer = Jump(model.parameters(), 1e-3)
    remember = lambda event: good.append(state(event.model)) and None
    with suppress(fastlur.NonFiniteError):
        run(model, blobs(24), blobs(40), steps=4, method=name, optimizer=optimizer, callbacks=[remember])
    assert all(p.isfinite().all() for p in model.parameters())
    assert same(state(model), good[-1])


@pytest.mark.parametrize("name", STEPPING)
def test_with_our_own_optimizer_too(name):
    model, good = mlp(), []
    remember = lambda event: good.append(state(event.model)) and None
    # its default stops at guessing, where these models begin: a direction of zeros
    stays = nullcontext() if name == "gradient_ascent" else pytest.raises(fastlur.NonFiniteError)
    with stays:
        run(model, blobs(24), blobs(40), steps=6, method=name, lr=1e38, schedule="constant", callbacks=[remember])
    assert all(p.isfinite().all() for p in model.parameters())
    if good:
        assert same(state(model), good[-1])


def test_an_optimizer_of_ones_own_that_fails_half_way_leaves_the_weights():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("half way")

    model = mlp()
    before = state(model)
    with pytest.raises(RuntimeError, match="half way"):
        run(model, blobs(24), blobs(40), optimizer=Fails(model.parameters(), 1.0))
    assert same(state(model), before)


class TestReach:
    """The bound against what really happens: never below it, and looked at anew before it drifts away."""

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("method", ["lur", "l1_sparse", "selective_amnesia"])
    def test_it_holds(self, optimizer, method, monkeypatch):
        seen, bounds = [], []
        advance = Reach.advance

        def watched(self, *args):
            fine = advance(self, *args)
            bounds.append(self._largest.tolist())
            return fine

        monkeypatch.setattr(Reach, "advance", watched)

        def look(event):
            seen.append(max(float(p.detach().abs().max()) for p in event.model.parameters()))

        options = {"lr": 0.5, "weight_decay": 0.1, "schedule": "constant", "optimizer": optimizer}
        run(mlp(), blobs(24), blobs(40), steps=30, method=method, callbacks=[look], **options)
        assert len(seen) == len(bounds) == 30
        assert all(weight <= bound for weight, (_, bound) in zip(seen, bounds, strict=True))
        assert all(bound <= 1e5 * weight for weight, (_, bound) in zip(seen, bounds, strict=True))

    @pytest.mark.parametrize("adamw", [False, True])
    def test_on_a_device_it_is_the_same_and_stays_there(self, adamw, monkeypatch):
        def bound():
            torch.manual_seed(0)
            made = Reach([torch.randn(5)], [torch.randn(5)], adamw)
            made.look(now=True)
            hyper = hyper_parameters("cpu", lr=0.1, momentum=0.9, weight_decay=0.1, l1=0.01, prox=0.2)
            dots = torch.tensor([0.1, 2.0, 3.0], dtype=torch.float64)
            centre, weights = [torch.ones(5)], [torch.full((5,), 2.0)]
            control = control_scalars("cpu")
            seen = []
            for pull in ((centre, weights), (centre, None), (None, None)):  # the last bears no trace of the others
                fine = made.advance(dots, control, hyper, *pull)
                seen += made._largest.tolist()
            return fine, seen

        fine, there = bound()
        assert fine is True
        monkeypatch.setattr("fastlur.reach.on_host", lambda value: False)
        fine, here = bound()
        assert isinstance(fine, torch.Tensor)
        assert bool(fine)
        assert here == pytest.approx(there)

    @pytest.mark.parametrize(("optimizer", "most"), [("sgd", 10), ("adamw", 12)])
    def test_on_a_device_it_takes_few_launches(self, optimizer, most, monkeypatch):
        """Every call that is no view is one there; those of the flag are among them."""

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, call, types, args=(), kwargs=None):
                if not call.is_view:
                    launched.append(call.name())
                return call(*args, **(kwargs or {}))

        monkeypatch.setattr("fastlur.reach.on_host", lambda value: False)
        bound, launched = Update._bound, []

        def counted(self, *args):
            with Counting():
                bound(self, *args)

        with fastlur.MetaStep(mlp(), optimizer=optimizer) as step:
            step(blobs(8), blobs(8))
            monkeypatch.setattr(Update, "_bound", counted)
            step(blobs(8), blobs(8))
        assert 0 < len(launched) <= most, launched

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_there_too_nothing_is_made_that_overflows(self, optimizer, monkeypatch):
        monkeypatch.setattr("fastlur.reach.on_host", lambda value: False)
        model, good = mlp(), []
        remember = lambda event: good.append(state(event.model)) and None
        options = {"lr": 1e38, "schedule": "constant", "optimizer": optimizer, "callbacks": [remember]}
        with pytest.raises(fastlur.NonFiniteError, match="the update would overflow"):
            run(model, blobs(8), blobs(20), **options)
        assert all(p.isfinite().all() for p in model.parameters())
        assert not good or same(state(model), good[-1])

    def test_it_costs_no_vector(self):
        model = mlp()
        with fastlur.MetaStep(model) as step:
            step(blobs(8), blobs(8))
            held = [value for value in vars(step.update._reach).values() if isinstance(value, torch.Tensor)]
            assert 2 <= sum(value.numel() for value in held) < 20

    def test_large_weights_and_rates_are_no_reason_to_stop(self):
        model = mlp()
        with torch.no_grad():
            model[3].weight.mul_(1e15)
        run(model, blobs(24), blobs(40), steps=40, lr=1e8, method="fine_tune", schedule="constant")
        assert all(p.isfinite().all() for p in model.parameters())


class TestBeforeAndAfter:
    def test_what_prepare_left_infinite_is_put_back(self):
        class Ruins(fastlur.LUR):
            def prepare(self, passes):
                made = super().prepare(passes)
                with torch.no_grad():
                    passes.space.theta.flats[0][3] = math.inf
                return made

        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        before = state(model)
        with pytest.raises(
            fastlur.NonFiniteError, match="not finite before the first step: as given, or by prepare of R"
        ):
            run(model, blobs(24), blobs(40), method=Ruins())
        assert same(state(model), before)

    @pytest.mark.parametrize("fails", ["infinite", "raises"])
    def test_what_finish_ruined_is_put_back(self, fails):
        class Ruins(fastlur.LUR):
            def finish(self, passes, made):
                with torch.no_grad():
                    passes.space.theta.flats[0][3] = math.inf
                    passes.space.model[1].running_mean.fill_(7.0)
                if fails == "raises":
                    raise RuntimeError("on the way")

        model, good = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)), []
        remember = lambda event: good.append(state(event.model)) and None
        error, said = (RuntimeError, "on the way") if fails == "raises" else (fastlur.NonFiniteError, "as after step 3")
        with pytest.raises(error, match=said):
            run(model, blobs(24), blobs(40), method=Ruins(), steps=3, callbacks=[remember])
        assert same(state(model), good[-1])


def test_that_nothing_was_made_is_told_though_the_host_looks_late(monkeypatch):
    """As on a GPU, where it looks every 32 steps."""
    model, seen = mlp(), {}
    monkeypatch.setattr("fastlur.step.Step.check", lambda *_: None)
    apply = Update.apply

    def jump(self, direction):
        if len(seen) == 3:
            self.set_lr(1e38)
        apply(self, direction)

    monkeypatch.setattr(Update, "apply", jump)

    def look(event):
        seen[event.step] = state(event.model)
        if event.step == 8:
            monkeypatch.undo()

    with pytest.raises(fastlur.NonFiniteError, match="the model is as after step 3") as caught:
        run(model, blobs(24), blobs(40), steps=9, callbacks=[look])
    assert caught.value.step == 4
    assert same(state(model), seen[3])
