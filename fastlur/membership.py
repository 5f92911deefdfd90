"""Differentiable membership attacks: small networks that tell training data from other data by a model's outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastlur.losses import wide
from fastlur.outputs import entropy, log_odds, modified_entropy

FEATURES = 5
WIDTH = 16
FITTING = 300  # full-batch steps of AdamW; far from long: the features are few and smooth


def features(logits: Tensor, targets: Tensor) -> Tensor:
    """What an attack looks at, shape (n, 5): log-odds of the label and of the answer, loss, entropy, modified entropy.

    The log-odds are straight in the logits, so that an attack gives a gradient even where the model is sure of itself;
    all are compressed by asinh, since losses range over orders of magnitude.
    """
    logits = wide(logits)
    loss = functional.cross_entropy(logits, targets, reduction="none")
    seen = (
        log_odds(logits, targets),
        log_odds(logits, logits.argmax(-1)),
        loss,
        entropy(logits),
        modified_entropy(logits, targets),
    )
    return torch.asinh(torch.stack(seen, dim=-1))


class Attackers:
    """K networks with one hidden layer, each blind to one of the features, so that one does not stand for another.

    Args:
        members: features of items a model was trained on, shape (n, 5).
        strangers: of items it was not trained on, shape (m, 5); both sides weigh the same, whatever their sizes.
        count: K ≥ 1.
        seed: of the initial weights.
    """

    def __init__(self, members: Tensor, strangers: Tensor, count: int, seed: int) -> None:
        every = torch.cat((members, strangers)).detach()
        self._mean, self._spread = every.mean(0), every.std(0, correction=0).clamp(min=1e-6)
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, scale: float) -> Tensor:
            weights = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return weights.to(every.device, every.dtype)

        sees = torch.ones(count, FEATURES)
        sees[torch.arange(count), torch.arange(count) % FEATURES] = 0
        self._sees = sees.to(every)[:, None, :]
        self._weights = [
            drawn(count, FEATURES, WIDTH, scale=FEATURES**-0.5),
            drawn(count, 1, WIDTH, scale=1.0),
            drawn(count, WIDTH, 1, scale=WIDTH**-0.5),
            drawn(count, 1, 1, scale=0.0),
        ]
        self._fit(every, len(members))

    def __call__(self, seen: Tensor) -> Tensor:
        """Log-odds of "member", shape (K, n), for features of shape (n, 5)."""
        into, into_bias, out, out_bias = self._weights
        x = (seen.to(self._mean) - self._mean) / self._spread
        hidden = torch.tanh((x * self._sees) @ into + into_bias)
        return (hidden @ out + out_bias).squeeze(-1)

    def tensors(self) -> dict[str, Tensor]:
        """All that a fitted attack consists of, by name."""
        named = {f"weight{i}": weight for i, weight in enumerate(self._weights)}
        return {"mean": self._mean, "spread": self._spread, **named}

    @torch.enable_grad()
    def _fit(self, every: Tensor, members: int) -> None:
        for weight in self._weights:
            weight.requires_grad_()
        optimizer = torch.optim.AdamW(self._weights, lr=0.03, weight_decay=0.01)
        for _ in range(FITTING):
            optimizer.zero_grad()
            odds = self(every)
            missed, alarm = functional.softplus(-odds[:, :members]), functional.softplus(odds[:, members:])
            torch.autograd.backward(missed.mean(1).sum() + alarm.mean(1).sum())
            optimizer.step()
        self._weights = [weight.detach() for weight in self._weights]
