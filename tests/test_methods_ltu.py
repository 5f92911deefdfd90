"""LTU: the feedback of classes and of attacks, and their harmonization, against oracles in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import blobs, mlp, run
from torch import nn
from torch.nn import functional

import fastlur
from fastlur.data import Feed, source
from fastlur.losses import cross_entropy
from fastlur.membership import Attackers, features
from fastlur.methods.ltu import LTU, forgetting, remembering
from fastlur.step import Step

F64 = torch.float64
ALPHA = 0.3


def opened(model, method, forget=None, retain=None, size=8):
    """A step of the method, its attacks fitted."""
    data = {"forget": forget or blobs(16, dtype=F64), "retain": retain or blobs(24, dtype=F64)}
    feed = Feed({side: source(d, side, size) for side, d in data.items()}, 0, torch.device("cpu"))
    return Step(model, method, {"retain": cross_entropy, "forget": cross_entropy}, lr=0.1, feed=feed, steps=9)


def directions(step, number, forget, retain):
    """Both vectors of step `number` at the present θ."""
    with step.passes.of_step(number, forget, retain):
        found = step.method.direction(step.passes, step.state)
    return tuple(torch.cat([view.reshape(-1).clone() for view in v.views]) for v in (found.retain, found.forget))


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def gradient(model, loss, theta):
    """∇loss of the model at θ, shape (n,)."""
    model = copy.deepcopy(model)
    nn.utils.vector_to_parameters(theta, model.parameters())
    return flat(torch.autograd.grad(loss(model), list(model.parameters())))


def meta(model, tune, test, rule="first_order", relative=False):
    """The direction of A(θ) + B(θ − α∇A(θ)), written out."""
    theta = flat(model.parameters())
    a = gradient(model, tune, theta)
    alpha = ALPHA / a.norm() if relative else ALPHA
    u = gradient(model, test, theta - alpha * a)
    return u + (a if rule == "first_order" else gradient(model, tune, theta - alpha * u))


def halves(count):
    """Every way to take the larger half of `count` things, and the rest."""
    every = set(range(count))
    return [(set(half), every - set(half)) for half in itertools.combinations(range(count), (count + 1) // 2)]


def matching(found, candidates):
    """Which of the candidates it is; exactly one."""
    (number,) = [i for i, each in enumerate(candidates) if torch.allclose(found, each, rtol=1e-8, atol=1e-11)]
    return number


def of_classes(batch, classes):
    """Half the mean cross-entropy of the items of some classes, item by item."""
    mine = [(x[None], y[None]) for x, y in zip(*batch, strict=True) if int(y) in classes]
    return lambda model: 0.5 * sum(functional.cross_entropy(model(x), y) for x, y in mine) / len(mine)


def of_attacks(attackers, batch, chosen, weight):
    """λ/2 · mean log(1 + odds) by networks and features spelled out."""
    into, into_bias, out, out_bias = attackers._weights

    def loss(model):
        rows = []
        for x, y in zip(*batch, strict=True):
            p = model(x[None])[0].softmax(-1)
            right, top, others = p[y], p.max(), [p[c] for c in range(len(p)) if c != y]
            rather = -(1 - right) * right.log() - sum(q * (1 - q).log() for q in others)
            seen = (right / (1 - right)).log(), (top / (1 - top)).log(), -right.log(), -(p * p.log()).sum(), rather
            rows.append(torch.stack(seen).asinh())
        seen, total = (torch.stack(rows) - attackers._mean) / attackers._spread, 0.0
        for k in chosen:
            visible = seen * torch.tensor([feature != k % 5 for feature in range(5)])
            odds = torch.tanh(visible @ into[k] + into_bias[k]) @ out[k] + out_bias[k]
            total = total + (1 + odds.exp()).log().sum()
        return weight / 2 * total / (len(chosen) * len(rows))

    return loss


class TestFeedback:
    @pytest.mark.parametrize("relative", [False, True])
    @pytest.mark.parametrize("rule", ["first_order", "secant"])
    def test_of_retained_classes_is_tuned_on_one_half_and_tested_on_the_other(self, rule, relative):
        model, forget, retain = mlp(dtype=F64), blobs(8, dtype=F64), blobs(16, dtype=F64)
        settings = {"inner_lr": ALPHA, "relative_inner_lr": relative, "gradient": rule, "harmonize": "none"}
        wanted = [
            meta(model, of_classes(retain, tune), of_classes(retain, test), rule, relative) for tune, test in halves(4)
        ]
        with opened(model, LTU(**settings)) as step:
            drawn = [matching(directions(step, n, forget, retain)[0], wanted) for n in range(1, 9)]
        assert len(set(drawn)) > 2  # anew in each step

    @pytest.mark.parametrize("attacks", [2, 3, 6])
    @pytest.mark.parametrize("rule", ["first_order", "secant"])
    def test_of_attacks_is_tuned_against_some_and_tested_against_those_held_out(self, rule, attacks):
        model, forget, retain = mlp(dtype=F64), blobs(8, dtype=F64), blobs(16, dtype=F64)
        weight = 1.7
        method = LTU(weight, ALPHA, gradient=rule, harmonize="none", attacks=attacks)
        with opened(model, method) as step:
            parts = [
                [of_attacks(step.state.attackers, forget, half, weight) for half in pair] for pair in halves(attacks)
            ]
            wanted = [meta(model, tune, test, rule) for tune, test in parts]
            drawn = [matching(directions(step, n, forget, retain)[1], wanted) for n in range(1, 9)]
        assert len(set(drawn)) > 1

    def test_the_default_inner_step_is_a_tenth_long(self):
        model, forget, retain = mlp(dtype=F64), blobs(8, dtype=F64), blobs(16, dtype=F64)
        settings = {}, {"inner_lr": 0.1, "relative_inner_lr": True}
        given, named = (opened(copy.deepcopy(model), LTU(**each), forget, retain) for each in settings)
        with given, named:
            one, two = (directions(step, 1, forget, retain) for step in (given, named))
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))

    def test_secant_is_the_true_gradient_to_second_order(self):
        """Against a double backward, with every half that can be drawn: the error falls as α², not as α."""
        model, retain, errors = mlp(dtype=F64), blobs(16, dtype=F64), {}
        names, theta = zip(*((n, p.detach().requires_grad_()) for n, p in model.named_parameters()), strict=True)
        for rule, alpha in itertools.product(("secant", "first_order"), (0.02, 0.002)):
            method = LTU(inner_lr=alpha, gradient=rule, harmonize="none")
            with opened(copy.deepcopy(model), method) as step:
                found = directions(step, 1, blobs(8, dtype=F64), retain)[0]
            left = []
            for tune, test in halves(4):
                at = lambda values: (
                    lambda x: torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)
                )
                a = of_classes(retain, tune)(at(theta))
                inner = torch.autograd.grad(a, theta, create_graph=True)
                b = of_classes(retain, test)(at([p - alpha * g for p, g in zip(theta, inner, strict=True)]))
                left.append(float((flat(torch.autograd.grad(a + b, theta)) - found).norm()))
            errors[rule, alpha] = min(left)
        assert errors["secant", 0.002] < 0.02 * errors["secant", 0.02]
        assert errors["first_order", 0.002] > 0.05 * errors["first_order", 0.02]
        assert errors["secant", 0.002] < 0.01 * errors["first_order", 0.002]

    def test_what_does_not_count_does_not_count(self):
        model, (x, y) = mlp(dtype=F64), blobs(10, dtype=F64)
        attackers = Attackers(*(features(model(blobs(20, dtype=F64)[0]).detach(), y.repeat(2)) for _ in "ab"), 4, 0)
        hidden = torch.where(torch.arange(10) < 6, y, -100)
        for make in (remembering, lambda tunes: forgetting(tunes, attackers)):
            for tunes in (True, False):
                values = []
                for batch in ((x, hidden), (x[:6], y[:6])):
                    torch.manual_seed(7)
                    values.append(make(tunes)(model, batch))
                torch.testing.assert_close(*values)

    def test_a_batch_of_one_class_gives_feedback_once(self):
        """The half without an item says nothing, and nothing is divided by zero."""
        model, retain = mlp(dtype=F64), (blobs(8, dtype=F64)[0], torch.ones(8, dtype=torch.long))
        theta = flat(model.parameters())
        with opened(model, LTU(harmonize="none")) as step:
            found = directions(step, 1, blobs(8, dtype=F64), retain)[0]
        alone = gradient(model, of_classes(retain, {1}), theta)
        torch.testing.assert_close(found, alone)


class TestHarmonization:
    def directions(self, harmonize, conflict):
        torch.manual_seed(4)
        model, (x, y) = mlp(dtype=F64), blobs(16, dtype=F64)
        with opened(model, LTU(harmonize=harmonize)) as step:
            step.state.attackers = lambda seen: seen[:, :1].T.expand(4, -1)  # whoever is sure of the label is a member
            # being sure of these very items is the opposite of being unsure of them, and of other answers it is not
            return directions(step, 1, (x, y), (x, y if conflict else (y + 1) % 4))

    def test_only_the_forget_gradient_gives_way_by_default(self):
        r, f = self.directions("none", True)
        assert r @ f < 0
        kept, purged = self.directions(LTU().harmonize, True)
        assert torch.equal(kept, r)
        torch.testing.assert_close(purged, f - (f @ r) / (r @ r) * r)

    def test_both_give_way_in_the_symmetric_form(self):
        r, f = self.directions("none", True)
        kept, purged = self.directions("symmetric", True)
        torch.testing.assert_close(kept, r - (f @ r) / (f @ f) * f)
        torch.testing.assert_close(purged, f - (f @ r) / (r @ r) * r)

    @pytest.mark.parametrize("harmonize", ["one_sided", "symmetric"])
    def test_gradients_that_agree_stay(self, harmonize):
        r, f = self.directions("none", False)
        assert r @ f > 0
        assert all(torch.equal(a, b) for a, b in zip(self.directions(harmonize, False), (r, f), strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"forget_weight": -1}, "forget_weight=-1"),
        ({"inner_lr": -0.1}, "inner_lr=-0.1"),
        ({"retain_fraction": 0}, "retain_fraction=0"),
        ({"retain_fraction": 1.1}, r"retain_fraction=1\.1"),
        ({"gradient": "exact"}, "gradient='exact'"),
        ({"harmonize": "both"}, "harmonize='both'"),
        ({"attacks": 1}, "attacks=1"),
        ({"attacks": 2.0}, r"attacks=2\.0"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        LTU(**wrong)


def test_data_that_cannot_be_looked_at_are_refused():
    class Endless:
        def __iter__(self):
            yield from [blobs(8), blobs(8)]

    with pytest.raises(fastlur.ArgumentError, match="do not tell their length"):
        run(mlp(), blobs(8), Endless(), method=LTU(retain_fraction=0.5))
    with pytest.raises(fastlur.ArgumentError, match=r"fastlur\.unlearn"):
        Step(mlp(), LTU(), {"retain": cross_entropy, "forget": cross_entropy})
