"""The gate lets no figure through for a step that does not align, or that goes the wrong way."""

from __future__ import annotations

import gate
import models
import pytest
import torch
from arms import OTHERS
from helpers import MODES, blobs, learnable, mlp
from torch import nn

from fastlur import meta
from fastlur.losses import cross_entropy
from fastlur.methods.lur import LUR, LURState
from fastlur.passes import Passes
from fastlur.update import Update

DIRECTION, DISPLACED = meta.direction, LURState.displaced


@pytest.fixture
def small():
    torch.manual_seed(0)
    return mlp(), blobs(32), blobs(32)


@pytest.mark.parametrize("mode", MODES)
def test_what_aligns_passes(mode, small):
    assert gate.check(*small, mode, "fp32") >= 0.99


@pytest.mark.parametrize("mode", MODES)
def test_so_does_what_hardly_has_a_gradient(mode):
    """Of a model that has learned both sides an update of an ordinary rate would drown in the rounding of weights."""
    torch.manual_seed(0)
    model, forget, retain = mlp(), learnable(32), learnable(32)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (cross_entropy(model, forget) + cross_entropy(model, retain)).backward()
        optimizer.step()
    assert sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5 < 3e-3
    assert gate.check(model, forget, retain, mode, "fp32") >= 0.9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_the_wrong_way_is_refused(mode, precision, small, monkeypatch):
    def displaced(self, along, norm2):
        self._inner_lr.neg_()
        try:
            return DISPLACED(self, along, norm2)
        finally:
            self._inner_lr.neg_()

    monkeypatch.setattr(LURState, "displaced", displaced)
    if mode == "exact":  # the other half of its alignment is no displacement
        monkeypatch.setattr(LURState, "linearized", turned(LURState.linearized))
    with pytest.raises(AssertionError, match=f"{mode} in {precision} does not align: cosine -"):
        gate.check(*small, mode, precision)


def turned(linearized):
    """The sign of the Hessian's part turned round."""

    def wrong(self):
        a, aligned = linearized(self)

        def other(v, norm2):
            self._inner_lr.neg_()
            try:
                return aligned(v, norm2)
            finally:
                self._inner_lr.neg_()

        return a, other

    return wrong


@pytest.mark.parametrize("mode", MODES)
def test_a_direction_that_is_negated_is_refused(mode, small, monkeypatch):
    made = LUR.direction

    def negated(self, passes, state):
        found = made(self, passes, state)
        if passes.step == 2:  # the one that is looked at; what "optimistic" keeps of the first stays right
            for half in (found.retain, found.forget):
                torch._foreach_neg_(half.flats)
        return found

    monkeypatch.setattr(LUR, "direction", negated)
    with pytest.raises(AssertionError, match=f"{mode} in fp32 does not align: cosine -"):
        gate.check(*small, mode, "fp32")


@pytest.mark.parametrize("mode", ["exact", "secant", "optimistic"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_half_of_the_alignment_is_not_passed_off_as_the_whole(mode, precision, small, monkeypatch):
    monkeypatch.setattr(meta, "direction", lambda arena, gradient, previous: DIRECTION(arena, "first_order"))
    gate.check(*small, "first_order", precision)
    with pytest.raises(AssertionError, match=f"{mode} in {precision} does not align"):
        gate.check(*small, mode, precision)


@pytest.mark.parametrize("mode", ["first_order", "secant", "optimistic"])
def test_a_displacement_of_another_length_is_refused(mode, small, monkeypatch):
    def displaced(self, along, norm2):
        self._inner_lr.mul_(2)
        try:
            return DISPLACED(self, along, norm2)
        finally:
            self._inner_lr.div_(2)

    monkeypatch.setattr(LURState, "displaced", displaced)
    with pytest.raises(AssertionError, match=rf"{mode} in fp32 is displaced (1\.[5-9]|2\.\d)\d? × as far"):
        gate.check(*small, mode, "fp32")


def test_with_lent_statistics_the_truth_has_them_too(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    lent = "optimistic, normalized by retain items"
    assert gate.check(model, blobs(32), blobs(64), lent, "fp32") >= 0.99
    monkeypatch.setattr(Passes, "_lending", lambda self, which: None)
    with pytest.raises(AssertionError, match="optimistic in fp32"):
        gate.check(model, blobs(32), blobs(64), lent, "fp32")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_others_are_refused_whatever_they_add(mode, small, monkeypatch):
    """An offset that every evaluation shares is none of what displacement adds."""
    made = Passes.gradient

    def shifted(self, which, out, at=None, **options):
        made(self, which, out, at, **options)
        for flat in out.flats:
            flat.add_(1.0)

    monkeypatch.setattr(Passes, "gradient", shifted)
    with pytest.raises(AssertionError, match=f"{mode} in fp32"):
        gate.check(*small, mode, "fp32")


def test_an_offset_of_the_outer_gradient_is_seen_though_it_is_none_of_what_displacement_adds(small, monkeypatch):
    made = Passes.gradient

    def shifted(self, which, out, at=None, **options):
        made(self, which, out, at, **options)
        if which == "forget":
            for flat in out.flats:
                flat.add_(1.0)

    monkeypatch.setattr(Passes, "gradient", shifted)
    with pytest.raises(AssertionError, match="first_order in fp32: the gradients are others"):
        gate.check(*small, "first_order", "fp32")


def test_weights_at_which_two_modes_cannot_be_told_apart_are_refused(monkeypatch):
    """As those of a perceptron that fits everything: rounding would decide."""
    _, batch = models.MODELS["mlp"]
    both = batch(8, 2), batch(8, 3)
    assert gate.check(models.model("mlp"), *both, "exact", "bf16") >= 0.9
    monkeypatch.setitem(models.TRAINED, "mlp", 25)
    with pytest.raises(AssertionError, match="too alike at these weights"):
        gate.check(models.model.__wrapped__("mlp"), *both, "exact", "fp32")


def test_several_arms_are_checked_each_as_if_alone(small):
    arms = ("optimistic", "exact", "exact, graph made anew")
    assert gate.check_all(*small, arms, "fp32") == {arm: gate.check(*small, arm, "fp32") for arm in arms}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", OTHERS)
def test_other_methods_pass_where_they_go_as_in_float64(arm, precision, small, monkeypatch):
    gate.check_others(*small, [arm], precision)
    made = Update.apply

    def twice(self, direction):
        made(self, direction)
        if self.space.theta.flats[0].dtype == torch.float32:
            made(self, direction)

    monkeypatch.setattr(Update, "apply", twice)
    with pytest.raises(AssertionError, match=f"{arm} in {precision} goes"):
        gate.check_others(*small, [arm], precision)


def test_an_update_that_does_something_else_is_refused(small, monkeypatch):
    made = Update.apply

    def twice(self, direction):
        made(self, direction)
        made(self, direction)

    monkeypatch.setattr(Update, "apply", twice)
    with pytest.raises(AssertionError, match="the update misses its direction"):
        gate.check(*small, "secant", "fp32")


def test_no_alignment_at_all_is_refused(small, monkeypatch):
    monkeypatch.setattr(LURState, "displaced", lambda self, along, norm2: self.passes.space.theta)
    with pytest.raises(AssertionError, match="does not align"):
        gate.check(*small, "secant", "fp32")
