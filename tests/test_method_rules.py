"""Relabelling, SalUn, Selective Amnesia and SSD against their rules written out in float64."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from helpers import blobs, mlp, run, state
from torch.nn import functional

import fastlur
from fastlur.data import to_device
from fastlur.errors import DataError
from fastlur.methods import METHODS, SaliencyMask
from fastlur.methods.importance import groups
from fastlur.methods.relabelling import random_label_loss, random_labels, wrong_label_loss
from fastlur.space import ParameterSpace
from fastlur.step import Step

SGD = {"momentum": 0.0, "schedule": "constant", "batch_size": 64}


def double(n):
    return blobs(n, dtype=torch.float64)


def gradient(model, data):
    loss = functional.cross_entropy(model(data[0]), data[1])
    return torch.autograd.grad(loss, list(model.parameters()))


def squares(model, data, size):
    """Mean over groups of items of the squared gradient, one tensor a parameter."""
    parts = [gradient(model, part) for part in zip(*(each.split(size) for each in data), strict=True)]
    return [sum(g.square() for g in each) / len(parts) for each in zip(*parts, strict=True)]


def fixed(value):
    """Labels as if drawn, without a draw."""
    return lambda targets, classes: (targets + value) % classes


class TestRandomLabels:
    def test_they_are_every_wrong_class_alike_and_never_the_true_one(self):
        targets = torch.randint(0, 5, (20_000,))
        drawn = random_labels(targets, 5)
        away = torch.bincount((drawn - targets) % 5, minlength=5)
        assert away[0] == 0
        assert all(4700 < int(n) < 5300 for n in away[1:])

    def test_targets_that_do_not_count_stay_so(self):
        targets = torch.tensor([1, -100, 2])
        assert int(random_labels(targets, 4)[1]) == -100
        model, (x, _) = mlp(), blobs(3)
        x[1] = 0.0
        random_label_loss(model, (x.requires_grad_(), targets)).backward()
        assert x.grad[1].abs().sum() == 0
        assert x.grad[0].abs().sum() > 0

    def test_one_class_is_refused(self):
        for loss in (random_label_loss, wrong_label_loss):
            with pytest.raises(DataError, match="at least two classes"):
                loss(mlp(classes=1), (torch.randn(3, 6), torch.zeros(3, dtype=torch.long)))

    def test_every_step_draws_anew(self, monkeypatch):
        drawn = []
        whole = random_labels

        def seen(targets, classes):
            drawn.append(whole(targets, classes) - targets)
            return whole(targets, classes)

        monkeypatch.setattr("fastlur.methods.relabelling.random_labels", seen)
        x, y = blobs(8)
        run(mlp(), (x, torch.zeros_like(y)), blobs(20), method="random_label", steps=3)
        assert len({tuple(each.tolist()) for each in drawn[-3:]}) == 3

    def test_the_update_is_that_of_both_losses(self, monkeypatch):
        monkeypatch.setattr("fastlur.methods.relabelling.random_labels", fixed(1))
        model, forget, retain = mlp(dtype=torch.float64), double(12), double(20)
        start = [p.detach().clone() for p in model.parameters()]
        wrong = forget[0], (forget[1] + 1) % 4
        expected = [r + 0.7 * f for r, f in zip(gradient(model, retain), gradient(model, wrong), strict=True)]
        run(model, forget, retain, method=METHODS["random_label"](0.7), steps=1, lr=0.1, **SGD)
        for p, before, g in zip(model.parameters(), start, expected, strict=True):
            torch.testing.assert_close(before - p, 0.1 * g, rtol=1e-9, atol=1e-12)

    def test_an_own_forget_loss_is_refused(self):
        for name in ("random_label", "salun", "ssd"):
            with pytest.raises(fastlur.ArgumentError, match=f"forget_loss: {name} defines"):
                run(mlp(), blobs(8), blobs(8), method=name, forget_loss=fastlur.losses.cross_entropy)


class TestSalUn:
    def test_it_is_random_labels_where_the_forget_gradient_is_large(self):
        model, forget, retain = mlp(dtype=torch.float64), double(12), double(20)
        start = [p.detach().clone() for p in model.parameters()]
        every = torch.cat([g.reshape(-1) for g in gradient(model.eval(), forget)]).abs()
        salient = every > every.sort().values[len(every) // 2 - 1]
        whole = copy.deepcopy(model)
        run(whole, forget, retain, method="random_label", steps=1, **SGD)
        run(model, forget, retain, method="salun", steps=1, **SGD)
        moved, free = (
            torch.cat([(p - q).reshape(-1) for p, q in zip(each.parameters(), start, strict=True)])
            for each in (model, whole)
        )
        assert torch.equal(moved != 0, salient)
        assert torch.equal(moved[salient], free[salient])

    def test_its_preset_is_the_published_one_and_its_share_can_be_chosen(self):
        assert METHODS["salun"].presets == {"cifar10": {"lr": 0.013, "epochs": 10}}
        assert METHODS["salun"]().mask == SaliencyMask(0.5)
        assert METHODS["salun"](mask=SaliencyMask(0.1)).settings()["mask"]["share"] == 0.1


class TestSelectiveAmnesia:
    def test_the_surrogate_is_the_expectation_of_random_wrong_labels(self):
        model, (x, y) = mlp(dtype=torch.float64), double(10)
        each = [functional.cross_entropy(model(x), (y + k) % 4) for k in (1, 2, 3)]
        torch.testing.assert_close(wrong_label_loss(model, (x, y)), sum(each) / 3)
        partly = torch.where(torch.arange(10) < 4, y, -100)
        torch.testing.assert_close(wrong_label_loss(model, (x, partly)), wrong_label_loss(model, (x[:4], y[:4])))

    def test_the_steps_are_those_of_the_objective(self):
        model, forget, retain = mlp(dtype=torch.float64), double(12), double(60)
        twin, gamma, weight, lr = copy.deepcopy(model), 0.6, 40.0, 0.05
        theta0 = [p.detach().clone() for p in twin.parameters()]
        retain = tuple(part[:12] for part in retain)  # one batch a side, always the same
        fisher = [(f + r) / 2 for f, r in zip(squares(twin, forget, 12), squares(twin, retain, 12), strict=True)]
        for _ in range(4):
            loss = wrong_label_loss(twin, forget) + gamma * functional.cross_entropy(twin(retain[0]), retain[1])
            for p, f, centre in zip(twin.parameters(), fisher, theta0, strict=True):
                loss = loss + weight * (f * (p - centre).square()).sum()
            grads = torch.autograd.grad(loss, list(twin.parameters()))
            with torch.no_grad():
                for p, g in zip(twin.parameters(), grads, strict=True):
                    p -= lr * g
        run(model, forget, retain, method=METHODS["selective_amnesia"](gamma, weight), steps=4, lr=lr, **SGD)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)

    def test_the_fisher_information_is_the_mean_over_the_batches_of_both_sides(self):
        seen = []
        whole = Step.__init__

        def opened(step, *arguments, **keywords):
            whole(step, *arguments, **keywords)
            seen.append([view.clone() for view in step.state.fisher.views])

        model, forget, retain = mlp(dtype=torch.float64), double(8), double(24)
        data = [(forget[0], forget[1])] + [tuple(part[i : i + 8] for part in retain) for i in (0, 8, 16)]
        expected = [sum(each) / 4 for each in zip(*(squares(model, one, 8) for one in data), strict=True)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step, "__init__", opened)
            run(model, forget, retain, method="selective_amnesia", steps=1)
        for f, wanted in zip(seen[0], expected, strict=True):
            torch.testing.assert_close(f, wanted)


class TestSSD:
    @pytest.mark.parametrize(("group", "size"), [(1, 1), (5, 5), (None, 64)])
    @pytest.mark.parametrize(("alpha", "dampening"), [(2.0, 1.0), (1.2, 0.3), (0.5, 1.5)])
    def test_what_matters_more_to_the_forget_data_is_dampened(self, alpha, dampening, group, size):
        model, forget, retain = mlp(dtype=torch.float64), double(10), double(20)
        before = state(model)
        ours, theirs = squares(model, forget, size), squares(model, retain, size)
        method = METHODS["ssd"](alpha, dampening, group=group)
        run(model, forget, retain, method=method, batch_size=64)
        selected = 0
        for (name, p), f, r in zip(model.named_parameters(), ours, theirs, strict=True):
            wanted = torch.where(f > alpha * r, before[name] * (dampening * r / f).clamp(max=1), before[name])
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-9, atol=1e-12)
            selected += int((f > alpha * r).sum())
        assert 0 < selected < sum(p.numel() for p in model.parameters())

    def test_gradients_that_are_not_finite_leave_the_model_alone(self):
        model, (x, y) = mlp(), blobs(8)
        before = state(model)
        fails = lambda m, batch: fastlur.losses.cross_entropy(m, batch) * (math.nan if len(batch[1]) == 1 else 1.0)
        with pytest.raises(fastlur.NonFiniteError, match="forget: a gradient"):
            run(model, (x, y), blobs(8), method="ssd", loss=fails)
        assert all(torch.equal(before[name], value) for name, value in state(model).items())

    def test_it_holds_as_many_vectors_as_it_says(self, monkeypatch):
        made, most = [], []
        vector = ParameterSpace.vector

        def recorded(space, dtype=None):
            new = vector(space, dtype)
            made.append(weakref.ref(new))
            most.append(sum(ref() is not None for ref in made))
            return new

        monkeypatch.setattr(ParameterSpace, "vector", recorded)
        method = METHODS["ssd"]()
        run(mlp(), blobs(8), blobs(8), method=method)
        assert max(most) == method.cost.buffers + 1  # and the optimizer's

    def test_a_mask_has_nothing_to_act_on(self):
        with pytest.raises(fastlur.ArgumentError, match="mask="):
            METHODS["ssd"](mask=SaliencyMask())


def test_batches_of_any_nesting_are_taken_apart_by_rows():
    x, y = torch.arange(5.0), torch.arange(5)
    assert [len(part[1]) for part in groups((x, y), 2)] == [2, 2, 1]
    nested = to_device({"a": [x, {"b": y}], "labels": y, "name": "n"}, torch.device("cpu"))
    parts = list(groups(nested, 4))
    assert [part["a"][1]["b"].tolist() for part in parts] == [[0, 1, 2, 3], [4]]
    uneven = (x, torch.zeros(3))
    assert list(groups(uneven, 1)) == [uneven]
    assert list(groups((x, y), None)) == [(x, y)]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("random_label", {"forget_weight": -0.1}, "forget_weight=-0.1"),
        ("salun", {"forget_weight": float("nan")}, "forget_weight=nan"),
        ("ssd", {"alpha": -1}, "alpha=-1"),
        ("ssd", {"dampening": "x"}, "dampening='x'"),
        ("ssd", {"batches": 0}, "batches=0"),
        ("ssd", {"group": 0}, "group=0"),
        ("selective_amnesia", {"retain_weight": -1}, "retain_weight=-1"),
        ("selective_amnesia", {"fisher_weight": -1}, "fisher_weight=-1"),
        ("selective_amnesia", {"batches": 0.5}, "batches=0.5"),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, settings, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        METHODS[name](**settings)
