"""A teacher's answers as a target: sharpened, at a temperature, with or without the true class."""

from __future__ import annotations

import pytest
import torch
from helpers import blobs, learnable, mlp, run, same, state
from target_cases import made
from torch import nn

import fastlur
from fastlur.targets import Imitation, Novice


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("without_truth", [False, True])
def test_is_the_divergence_from_the_sharpened_answers(sharpness, without_truth):
    model, teacher, (x, y) = mlp(dtype=torch.float64), mlp(dtype=torch.float64), blobs(9, dtype=torch.float64)
    q = torch.softmax(teacher(x), -1) ** sharpness
    if without_truth:
        q = torch.where(nn.functional.one_hot(y, 4).bool(), 0.0, q)
    q = q / q.sum(-1, keepdim=True)
    p = torch.softmax(model(x), -1)
    wanted = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - p.log()), 0.0).sum(-1).mean()
    found = Imitation(teacher, sharpness, without_truth)(model, (x, y))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # the teacher's answers are float32


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_flattens_both_sides(temperature):
    model, teacher, (x, y) = mlp(dtype=torch.float64), mlp(dtype=torch.float64), blobs(9, dtype=torch.float64)
    q, p = (torch.softmax(each / temperature, -1) for each in (1.5 * teacher(x), model(x)))
    wanted = temperature**2 * (q * (q.log() - p.log())).sum(-1).mean()
    found = Imitation(teacher, 1.5, temperature=temperature)(model, (x, y))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    novice = Novice(epochs=20, lr=3e-2, temperature=temperature)
    assert made(novice, mlp(), blobs(12), learnable(64)).temperature == temperature


@pytest.mark.parametrize("temperature", [1.0, 1e3])
def test_without_the_truth_it_has_no_share_at_any_temperature(temperature):
    logits, labels = torch.zeros(1, 4, requires_grad=True), torch.tensor([1])
    target = Imitation(nn.Identity(), without_truth=True, temperature=temperature)
    torch.autograd.backward(target(lambda _: logits, (torch.zeros(1, 4), labels)))
    shares = 1 / 4 - logits.grad[0] / temperature  # of the target, from the gradient T · (p − q)
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 0.0, 1 / 3, 1 / 3]))


def test_a_temperature_brings_what_is_nearly_right_to_its_sureness():
    """At T = 1 there is hardly a gradient between 0.99 and 0.9999: in 50 steps the way is hardly begun."""
    wanted, left = torch.tensor([[4.6, 0.0]]), {}
    for temperature in (1.0, 2.0, 4.0):
        logits = torch.tensor([[9.2, 0.0]], requires_grad=True)
        teacher = nn.Linear(1, 2, bias=False)
        teacher.weight.data = wanted.T.clone()
        target = Imitation(teacher, temperature=temperature)
        for _ in range(50):
            slope = torch.autograd.grad(target(lambda _, at=logits: at, (torch.ones(1, 1), torch.tensor([0]))), logits)
            logits = (logits - slope[0]).detach().requires_grad_()
        left[temperature] = abs(float((logits[0, 0] - logits[0, 1]).detach()) - 4.6)
    assert left[1.0] > 3
    assert max(left[2.0], left[4.0]) < 0.1


def test_weight_is_a_factor_on_it():
    model, teacher, data = mlp(), mlp(), blobs(9)
    one, three = (Imitation(teacher, 2.0, weight=weight)(model, data) for weight in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one)
    assert made(Novice(epochs=20, lr=3e-2, weight=3.0), mlp(), blobs(12), learnable(64)).weight == 3.0


def test_asks_the_teacher_in_eval_mode_and_leaves_it_alone():
    teacher, (x, y) = mlp(dropout=0.9).train(), blobs(9)
    target, before = Imitation(teacher), state(teacher)
    model = mlp()
    assert torch.equal(target(model, (x, y)), target(model, (x, y)))
    torch.autograd.backward(target(model, (x, y)))
    assert all(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert same(before, state(teacher))


def test_serves_any_method_that_takes_a_forget_loss():
    teacher, data = mlp(), (blobs(12), blobs(20))
    for method in ("lur", "neggrad_plus", "pcgrad", "gru", "eupmu", "selective_amnesia", "gradient_ascent"):
        model = mlp()
        before = state(model)
        run(model, *data, method=method, forget_loss=Imitation(teacher))
        assert not same(before, state(model)), method


def test_refuses_what_is_no_teacher_and_what_is_no_power():
    with pytest.raises(fastlur.ArgumentError, match=r"teacher: a str is no torch\.nn\.Module"):
        Imitation("teacher")
    with pytest.raises(fastlur.ArgumentError, match="sharpness"):
        Imitation(mlp(), -1.0)
    with pytest.raises(fastlur.ArgumentError, match="temperature"):
        Imitation(mlp(), temperature=0.0)
