"""MOX: what is memorised, where extrapolation leads, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Interrupted, blobs, mlp, same, state
from torch import nn
from torch.nn import functional

import fastlur
from fastlur.data import Feed, source
from fastlur.methods import METHODS
from fastlur.methods.mox import MOX, divergence
from fastlur.step import Step

F64 = torch.float64


def step(model, method, lr=0.1, steps=4):
    """A step of the method, open, over a small model."""
    losses = {"retain": fastlur.losses.cross_entropy, "forget": method.default_forget_loss("classification")}
    feed = Feed({side: source(blobs(16, dtype=F64), side, 8) for side in losses}, 0, torch.device("cpu"))
    return Step(model, method, losses, lr=lr, momentum=0.0, steps=steps, feed=feed)


def memorising_loss(model, given, forget, retain):
    """The published objective, spelled out item by item."""
    total = sum(functional.cross_entropy(model(x[None]), y[None]) for x, y in zip(*forget, strict=True))
    total = total / len(forget[1])
    for x in retain[0]:
        p, q = given(x[None]).softmax(-1), model(x[None]).softmax(-1)
        total = total + (p * (p / q).log()).sum() / len(retain[0])
    return total


def moved(model, loss, lr):
    """The model after one plain step of gradient descent."""
    model = copy.deepcopy(model)
    for p, g in zip(model.parameters(), torch.autograd.grad(loss(model), list(model.parameters())), strict=True):
        p.data -= lr * g
    return model


def close(a, b):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-10, atol=1e-12)


class TestMemorising:
    def test_descends_the_cross_entropy_and_the_divergence_from_the_model_as_given(self):
        model = mlp(dtype=F64)
        given = copy.deepcopy(model)
        forget, retain = blobs(8, dtype=F64), blobs(10, dtype=F64)
        twin = copy.deepcopy(model)
        with step(model, MOX(alpha=1.0), lr=0.5) as s:
            for _ in range(3):
                s(forget, retain)
                twin = moved(twin, lambda m: memorising_loss(m, given, forget, retain), 0.5)
            close(model, twin)

    def test_the_divergence_has_no_gradient_at_the_model_as_given(self):
        model, batch = mlp(dtype=F64), blobs(8, dtype=F64)
        reference = model(batch[0]).detach()
        loss = divergence(reference, model, batch)
        assert abs(float(loss.detach())) < 1e-14
        assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, list(model.parameters()))) < 1e-15

    def test_the_divergence_is_from_the_reference_to_the_model(self):
        """KL is not symmetric; p stands first: p_θ₀ = (½, ½), p_θ = (¾, ¼)."""
        reference, now = torch.zeros(1, 2, dtype=F64), torch.tensor([[0.75, 0.25]], dtype=F64).log()
        found = divergence(reference, lambda x: now, (torch.zeros(1), torch.tensor([0])))
        assert float(found) == pytest.approx(0.5 * torch.tensor([0.5 / 0.75, 0.5 / 0.25]).log().sum().item())

    def test_targets_that_do_not_count_do_not_count(self):
        reference, now = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
        all_of_two = divergence(reference[:2], lambda x: now[:2], (torch.zeros(2), torch.tensor([0, 1])))
        two_of_four = divergence(reference, lambda x: now, (torch.zeros(4), torch.tensor([0, 1, -100, -100])))
        assert float(all_of_two) == pytest.approx(float(two_of_four))

    def test_npo_descends_its_own_form(self):
        model, given = mlp(dtype=F64), None
        forget, retain = blobs(8, dtype=F64), blobs(10, dtype=F64)
        beta, lr = 0.7, 0.3
        twin = given = copy.deepcopy(model)

        def npo(m):
            p, p0 = (each(forget[0]).softmax(-1)[torch.arange(8), forget[1]] for each in (m, given))
            kept = memorising_loss(m, given, forget, retain) - functional.cross_entropy(m(forget[0]), forget[1])
            return (2 / beta) * torch.sigmoid(-beta * (p / p0.detach()).log()).log().mean() + kept

        with step(model, MOX(alpha=1.0, memorise="npo", beta=beta), lr=lr) as s:
            for _ in range(2):
                s(forget, retain)
                twin = moved(twin, npo, lr)
            close(model, twin)

    def test_npo_at_the_model_as_given_has_the_gradient_of_the_plain_form(self):
        """There σ is ½, so that the factor 2 cancels and β with it."""
        data = blobs(8, dtype=F64), blobs(8, dtype=F64)
        plain = mlp(dtype=F64)
        npo = copy.deepcopy(plain)
        for model, form in ((plain, "plain"), (npo, "npo")):
            with step(model, MOX(alpha=1.0, memorise=form, beta=3.0)) as s:
                s(*data)
        close(plain, npo)

    @pytest.mark.parametrize("target", [2, (1, 2, 3, 0)])
    def test_a_target_is_pushed_away_while_memorising_up_to_the_cap(self, target):
        model, lr, cap = mlp(dtype=F64), 0.5, 0.05
        twin = given = copy.deepcopy(model)
        forget, retain = blobs(8, dtype=F64), blobs(10, dtype=F64)
        wanted = (
            torch.tensor(target).expand(4)[forget[1]] if isinstance(target, int) else torch.tensor(target)[forget[1]]
        )
        left_alone = []

        def loss(m):
            dearer = functional.cross_entropy(m(forget[0]), wanted, reduction="none")
            dearer = dearer - functional.cross_entropy(given(forget[0]), wanted, reduction="none").detach()
            left_alone.append(int((dearer > cap).sum()))
            return memorising_loss(m, given, forget, retain) - dearer.clamp(max=cap).mean()

        with step(model, MOX(alpha=1.0, target=target, target_cap=cap), lr=lr) as s:
            for _ in range(3):
                s(forget, retain)
                twin = moved(twin, loss, lr)
            close(model, twin)
        assert left_alone[0] == 0
        assert any(left_alone)

    def test_a_target_that_the_model_does_not_have_is_refused(self):
        for target in (4, (0, 1)):
            with pytest.raises(fastlur.ArgumentError, match="4 classes"), step(mlp(dtype=F64), MOX(target=target)) as s:
                s(blobs(8, dtype=F64), blobs(8, dtype=F64))


class TestExtrapolation:
    @pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
    def test_leads_as_far_to_the_other_side(self, alpha):
        model = mlp(dtype=F64)
        given = state(model)
        with step(model, MOX(alpha=alpha)) as s:
            s(blobs(8, dtype=F64), blobs(8, dtype=F64))
            memorised = state(model)
            s.finish()
        for name, value in state(model).items():
            torch.testing.assert_close(value, (1 + alpha) * given[name] - alpha * memorised[name], rtol=1e-12, atol=0)

    @pytest.mark.parametrize("stopped", [7, 8, 9])
    def test_momentum_averages_the_extrapolated_weights_over_rounds(self, stopped):
        """Nine steps in three rounds, or stopped within the last one, or just before it."""
        model, eta, alpha = mlp(dtype=F64), 0.675, 2.0
        given, after = state(model), []
        with step(model, MOX(alpha=alpha, momentum=eta, rounds=3), steps=9) as s:
            for number in range(1, stopped + 1):
                s(blobs(8, dtype=F64), blobs(8, dtype=F64))
                if number in (3, 6, stopped):
                    after.append(state(model))
            s.finish()
        for name, value in state(model).items():
            first, *others = ((1 + alpha) * given[name] - alpha * memorised[name] for memorised in after)
            wanted = first
            for each in others:
                wanted = eta * each + (1 - eta) * wanted
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("momentum", [1.0, 0.675])
    def test_what_no_loss_reaches_stays_bit_for_bit(self, momentum):
        """(1 + α)θ − αθ is not θ in floating point."""
        model = nn.ModuleDict({"body": mlp(), "unused": nn.Linear(50, 50), "words": nn.Embedding(6, 6)})
        model.forward = lambda x: model["body"](model["words"](x))
        start = state(model)
        items = torch.randint(0, 3, (2, 20)), torch.randint(0, 4, (2, 20))
        method = MOX(alpha=3.3, momentum=momentum, rounds=3)
        forget, retain = (items[0][0], items[1][0]), (items[0][1], items[1][1])
        fastlur.unlearn(
            model, forget, retain, method=method, steps=6, weight_decay=0.1, allow_overlap=True, progress=False
        )
        now = state(model)
        assert torch.equal(now["unused.weight"], start["unused.weight"])
        assert not torch.equal(now["body.0.weight"], start["body.0.weight"])

    def test_statistics_stay_as_given(self, cnn):
        data = (torch.rand(12, 1, 8, 8), torch.arange(12) % 10), (torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
        before = {name: b.clone() for name, b in cnn.named_buffers()}
        fastlur.unlearn(cnn, *data, method="mox", steps=4, progress=False)
        assert all(torch.equal(b, before[name]) for name, b in cnn.named_buffers())


class TestSearch:
    def retain_loss(self, model, retain):
        return float(fastlur.losses.cross_entropy(model.eval(), retain).detach())

    @pytest.mark.parametrize(
        ("limit", "lr", "powers"), [(0.02, 0.01, range(13)), (0.2, 0.01, range(13)), (0.05, 1.0, range(-8, 1))]
    )
    def test_goes_as_far_as_the_retain_loss_allows(self, limit, lr, powers):
        """At the high rate the first try is too far already."""
        forget, retain = blobs(16, dtype=F64), blobs(64, dtype=F64)
        model = mlp(dtype=F64)
        fastlur.unlearn(model, retain, forget, method=METHODS["lur"](forget_weight=0), steps=1, progress=False)
        given, found, memorised = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
        options = {"steps": 30, "batch_size": 64, "progress": False, "lr": lr}
        fastlur.unlearn(found, forget, retain, method=MOX(retain_limit=limit), **options)
        fastlur.unlearn(memorised, forget, retain, method=MOX(alpha=1.0), **options)  # 2θ₀ − θ_mem
        before = self.retain_loss(given, retain)
        tried = [0.5 * 2 ** (k / 2) for k in powers]
        fit, losses = [], []
        for alpha in tried:
            candidate = copy.deepcopy(given)
            for p, p0, p1 in zip(candidate.parameters(), given.parameters(), memorised.parameters(), strict=True):
                p.data = p0.data + alpha * (p1.data - p0.data)
            fit.append(candidate)
            losses.append(self.retain_loss(candidate, retain) - before)
        allowed = [loss <= limit for loss in losses]
        last = allowed.index(False) - 1
        assert 0 <= last < len(tried) - 2 and not any(allowed[last + 1 :])
        close(found, fit[last])

    def test_says_so_where_no_step_is_allowed(self):
        model = mlp()
        start = state(model)
        with pytest.warns(UserWarning, match="stays as given"):
            fastlur.unlearn(
                model, blobs(16), blobs(16), method=MOX(retain_limit=0.0), steps=40, lr=1.0, seed=3, progress=False
            )
        assert same(start, state(model))

    def test_needs_data_to_search_on(self):
        with pytest.raises(fastlur.ArgumentError, match=r"fastlur\.unlearn"):
            Step(mlp(), MOX(), {"retain": fastlur.losses.cross_entropy, "forget": fastlur.losses.cross_entropy})


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_a_budget_on_the_retain_loss_holds_for_the_extrapolated_model(alpha):
    """Memorising is stopped by it, and what is extrapolated from there is judged too: far away, the model stays."""
    forget, retain = blobs(16), blobs(64)
    options = {"method": MOX(alpha=alpha), "steps": 40, "lr": 0.05, "batch_size": 64, "progress": False}
    model = mlp()
    given, before = state(model), loss_in_eval_mode(model, retain)
    result = fastlur.unlearn(model, forget, retain, max_retain_loss_increase=0.02, checkpoint_every=100, **options)
    assert "rolled back" in result.ended
    assert 0 < len(result.history["step"]) < 40
    assert loss_in_eval_mode(model, retain) <= before + 0.02 + 1e-6
    assert same(state(model), given) == (alpha == 1.0)


def loss_in_eval_mode(model, data):
    with torch.no_grad():
        return float(fastlur.losses.cross_entropy(model.eval(), data))


def test_an_interrupted_run_ends_the_same(tmp_path):
    method = MOX(alpha=2.0, momentum=0.5, rounds=5)
    forget, retain = blobs(20), blobs(50)
    options = {"method": method, "steps": 10, "progress": False, "batch_size": 8}
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    start = copy.deepcopy(model.state_dict())
    fastlur.unlearn(twin, forget, retain, **options)

    def breaks(event):
        if event.step == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        fastlur.unlearn(model, forget, retain, checkpoint=tmp_path, checkpoint_every=3, callbacks=[breaks], **options)
    model.load_state_dict(start)
    fastlur.unlearn(model, forget, retain, checkpoint=tmp_path, checkpoint_every=3, **options)
    assert same(state(model), state(twin))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"alpha": -1}, "alpha=-1"),
        ({"momentum": 0}, "momentum=0"),
        ({"momentum": 1.1}, r"momentum=1\.1"),
        ({"rounds": 0}, "rounds=0"),
        ({"memorise": "npp"}, "did you mean 'npo'"),
        ({"beta": 0}, "beta=0"),
        ({"target": -1}, "target=-1"),
        ({"target": (1, 2.5)}, "target="),
        ({"retain_limit": float("nan")}, "retain_limit=nan"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        MOX(**wrong)


def test_presets_are_complete():
    settings = fastlur.methods.preset("mox", "llm_momentum")
    assert (settings["method"].alpha, settings["method"].momentum, settings["lr"]) == (4.0, 0.675, 1e-5)
