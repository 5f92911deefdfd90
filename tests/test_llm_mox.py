"""MOX on text: what is memorised of answers, towards and away from which, and one forget set after the other."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import of_both, same, state
from tiny_lm import TinyLM, answers, learned, padded, rows, texts

import fastlur
from fastlur.llm import with_preferred
from fastlur.llm.likelihood import likelihood
from fastlur.methods.mox import MOX


def run(model, forget, retain, method, **options):
    options = {
        "steps": 1,
        "lr": 0.3,
        "momentum": 0.0,
        "schedule": "constant",
        "batch_size": 50,
        "progress": False,
    } | options
    return fastlur.unlearn(model, forget, retain, method=method, task="causal_lm", **options)


def kept(model, given, batch):
    found = []
    for ids, labels in rows(batch):
        p, q = given(ids[None]).softmax(-1)[0].detach(), model(ids[None]).softmax(-1)[0]
        found += [(p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum() for i in range(1, len(ids)) if labels[i] != -100]
    return torch.stack(found).mean()


def plain(model, given, batch):
    p, lengths = answers(model, batch)
    return -p.sum() / lengths.sum()


def npo(beta):
    def loss(model, given, batch):
        ratio = answers(model, batch)[0] - answers(given, batch)[0].detach()
        return 2 / beta * torch.sigmoid(-beta * ratio).log().mean()

    return loss


def dearer(model, given, batch, cap):
    """Mean rise of the cross-entropy, token by token, up to the cap."""
    found = []
    for ids, labels in rows(batch):
        p, q = (m(ids[None]).log_softmax(-1)[0] for m in (model, given))
        places = [i for i in range(1, len(ids)) if labels[i] != -100]
        found += [(q[i - 1, labels[i]].detach() - p[i - 1, labels[i]]).clamp(max=cap) for i in places]
    return torch.stack(found).mean()


def memorised(model, given, loss, forget, retain, steps, lr=0.3):
    model = copy.deepcopy(model)
    for _ in range(steps):
        value = loss(model, given, forget) + kept(model, given, retain)
        for p, g in zip(model.parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True):
            p.data -= lr * g
    return model


@pytest.mark.parametrize("moved", [lambda b: b, lambda b: padded(b, 3)], ids=["as_it_is", "padded"])
@pytest.mark.parametrize("form", ["plain", "npo", "targeted"])
def test_the_model_is_extrapolated_from_what_was_memorised(form, moved):
    model, forget, retain, other = TinyLM(), texts(5), texts(6, seed=1), texts(5, longest=6, seed=2, asked=0)
    given, alpha = copy.deepcopy(model), 1.5
    methods = {
        "plain": (MOX(alpha=alpha), plain),
        "npo": (MOX(alpha=alpha, memorise="npo", beta=0.4), npo(0.4)),
        "targeted": (
            MOX(alpha=alpha, target="preferred", target_cap=0.2),
            lambda m, g, b: plain(m, g, b) - dearer(m, g, other, 0.2),
        ),
    }
    method, loss = methods[form]
    wanted = memorised(model, given, loss, forget, retain, 3)
    data = with_preferred(moved(forget), moved(other)) if form == "targeted" else moved(forget)
    run(model, data, moved(retain), method, steps=3)
    for p, p0, p1 in zip(model.parameters(), given.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, (1 + alpha) * p0 - alpha * p1, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_npo_at_the_model_as_given_has_the_gradient_of_the_answers_likelihood(beta):
    """σ is ½ there, so that β cancels; of whole answers and not of tokens, unlike the plain form."""
    model, forget = TinyLM(), texts(5)
    p = answers(model, forget)[0].mean()
    gradients = torch.autograd.grad(p, list(model.parameters()))
    wanted = [before.detach() - 0.3 * g for before, g in zip(model.parameters(), gradients, strict=True)]
    run(model, forget, texts(6, seed=1), MOX(alpha=1.0, memorise="npo", beta=beta))
    for now, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(now.detach(), value, rtol=1e-9, atol=1e-12)


def per_token(model, batch):
    with torch.no_grad():
        found = likelihood(model, batch)
    return float((found.log_probs / found.tokens).mean())


FORGET, RETAIN = texts(6), texts(18, seed=1)


@pytest.mark.parametrize(
    "method",
    [MOX(retain_limit=0.3), MOX(retain_limit=0.3, momentum=0.675, rounds=4), MOX(retain_limit=0.3, memorise="npo")],
    ids=["plain", "momentum", "npo"],
)
def test_answers_are_forgotten_and_others_are_not(method):
    model = learned(FORGET, RETAIN)
    before = per_token(model, FORGET), per_token(model, RETAIN)
    run(model, FORGET, RETAIN, method, steps=40, lr=1e-3, optimizer="adamw")
    after = per_token(model, FORGET), per_token(model, RETAIN)
    assert before[0] - after[0] > 2 * (before[1] - after[1])
    assert before[0] - after[0] > 0.3
    assert before[1] - after[1] < 0.35


def test_a_wanted_answer_becomes_likelier_than_without_a_target():
    other = texts(6, seed=8, asked=0)
    found = {}
    for target in (None, "preferred"):
        model = learned(FORGET, RETAIN)
        method = MOX(alpha=2.0, target=target)
        run(
            model,
            with_preferred(FORGET, other),
            RETAIN,
            method,
            steps=20,
            lr=1e-3,
            optimizer="adamw",
            max_grad_norm=1.0,
        )
        found[target] = per_token(model, other)
    assert found["preferred"] > found[None] + 0.1


def test_forget_sets_come_one_after_the_other():
    """The second run keeps to what the first one left, and is extrapolated from there."""
    model, retain, alpha = TinyLM(), texts(6, seed=1), 1.5
    wanted = copy.deepcopy(model)
    for forget in (texts(5), texts(5, seed=4)):
        further = memorised(wanted, copy.deepcopy(wanted), plain, forget, retain, 2)
        for p, p1 in zip(wanted.parameters(), further.parameters(), strict=True):
            p.data = (1 + alpha) * p.data - alpha * p1.data
        run(model, forget, retain, MOX(alpha=alpha), steps=2)
    for p, p1 in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, p1, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [MOX(alpha=1.0, momentum=0.5, rounds=3), MOX(alpha=1.0, target="preferred")])
def test_an_interrupted_run_ends_the_same(tmp_path, method):
    forget, retain = with_preferred(texts(7), texts(7, seed=2, asked=0)), texts(9, seed=1)
    model, options = TinyLM(dropout=0.2), {"steps": 6, "batch_size": 3}
    assert same(*of_both(model, partial(run, model, forget, retain, method, **options), tmp_path))


def test_what_does_not_fit_is_refused_and_nothing_has_moved():
    model = TinyLM()
    before = state(model)
    with pytest.raises(fastlur.ArgumentError, match="use target='preferred'"):
        run(model, texts(5), texts(6, seed=1), MOX(alpha=1.0, target=3))
    with pytest.raises(fastlur.DataError, match="with_preferred"):
        run(model, texts(5), texts(6, seed=1), MOX(alpha=1.0, target="preferred"))
    with pytest.raises(fastlur.ArgumentError, match="'preferred', or None"):
        MOX(target="prefered")
    assert same(before, state(model))
