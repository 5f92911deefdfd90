"""What a classifier's outputs give away about an item: functions of logits, shape (n, classes), row by row.

All are differentiable, in nats, of shape (n,), and finite however sure of itself the model is; a class that is ruled
out (a logit of −∞) adds nothing, p log p being 0 at p = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST = -1e9  # a log-probability, in place of −∞, which times 0 is not a number


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """log(p/(1 − p)) of one class a row; straight in the logits, so that it still moves where p is 1 or 0."""
    index = classes[:, None]
    others = logits.scatter(-1, index, -torch.inf)
    return logits.gather(-1, index).squeeze(-1) - others.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p."""
    likely = functional.log_softmax(logits, dim=-1)
    return -(likely.exp() * likely.clamp(min=LEAST)).sum(-1)


def modified_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−(1 − p_y) log p_y − Σ_{i≠y} p_i log(1 − p_i): 0 where the model is sure and right, large where sure and wrong.

    Source: Song & Mittal, arXiv 2003.10595.
    """
    likely = functional.log_softmax(logits, dim=-1)
    index = targets[:, None]
    right, p = likely.gather(-1, index).squeeze(-1), likely.exp()
    unlike = torch.log1p(-p.clamp(max=1 - torch.finfo(p.dtype).eps))
    wrong = (p * unlike).scatter(-1, index, 0.0).sum(-1)
    return -(1 - right.exp()) * right - wrong
