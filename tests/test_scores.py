"""What a classifier says about each item, against formulas in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastlur.outputs import entropy, log_odds, modified_entropy
from fastlur.scores import scores


class Says(nn.Module):
    """Its logits are its input."""

    def forward(self, x):
        return x


def by_hand(logits, target):
    """Every field of the scores of one item, from its probabilities."""
    total = sum(math.exp(v) for v in logits)
    p = [math.exp(v) / total for v in logits]
    right = p[target]
    return {
        "target": target,
        "hit": float(max(p) == right),
        "loss": -math.log(right),
        "confidence": right,
        "log_odds": math.log(right / (1 - right)),
        "entropy": -sum(q * math.log(q) for q in p),
        "modified_entropy": -(1 - right) * math.log(right)
        - sum(q * math.log(1 - q) for i, q in enumerate(p) if i != target),
    }


def test_every_number_is_that_of_its_definition():
    logits, targets = 2 * torch.randn(50, 4), torch.randint(0, 4, (50,))
    found = scores(Says(), (logits, targets), "test", 7)
    wanted = [by_hand(row, target) for row, target in zip(logits.tolist(), targets.tolist(), strict=True)]
    for name in found._fields:
        values = getattr(found, name)
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, [each[name] for each in wanted], rtol=1e-6, err_msg=name)


def test_accuracy_of_each_class_that_occurs():
    targets = torch.tensor([0, 0, 0, 2, 2, 3, -100])
    said = torch.tensor([0, 1, 0, 2, 2, 0, 0])
    found = scores(Says(), (torch.nn.functional.one_hot(said, 5).float(), targets), "test", 4).per_class()
    assert found == {0: pytest.approx(200 / 3), 2: 100, 3: 0}


def test_the_modified_entropy_is_small_where_sure_and_right_and_large_where_sure_and_wrong():
    logits = torch.tensor([[9.0, 0, 0], [0, 0, 0], [9.0, 0, 0]], dtype=torch.float64)
    right, unsure, wrong = modified_entropy(logits, torch.tensor([0, 0, 1])).tolist()
    assert 0 < right < 0.01 < unsure < wrong
    plain = entropy(logits)
    assert plain[0] == plain[2]  # which cannot tell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_is_finite_and_has_a_gradient_however_sure_the_model_is(dtype):
    logits = torch.tensor([[800.0, 0, -800], [800, 0, -800], [0, 0, 0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 2, 1])
    for value in (log_odds(logits, targets), entropy(logits), modified_entropy(logits, targets)):
        (slope,) = torch.autograd.grad(value.sum(), logits)
        assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(slope).all())
    moved = torch.autograd.grad(log_odds(logits, targets).sum(), logits)[0]
    assert all(bool(row.any()) for row in moved)


def test_log_odds_are_straight_in_the_logits():
    logits = torch.tensor([[40.0, 0, 0]], dtype=torch.float64)
    assert float(log_odds(logits, torch.tensor([0]))) == pytest.approx(40 - math.log(2))
    assert float(log_odds(-logits, torch.tensor([0]))) == pytest.approx(-40 - math.log(2))
