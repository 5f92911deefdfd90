"""Gradients of single items against a given change, and the inputs whose gradient matches it best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlur.audit.items import count, rows
from fastlur.errors import DataError, ModelError, told
from fastlur.losses import cross_entropy, logits_and_targets, split

TINY = 1e-30


def alignments(model: nn.Module, directions: Sequence[Mapping[str, Tensor]], batch: object) -> np.ndarray:
    """Cosine between directions and the gradient of each item's loss, shape (n, directions); 0 where either is 0.

    One pass an item, in eval mode.
    """
    moving, names = dict(model.named_parameters()), list(directions[0])
    found = []
    for index in range(count(batch)):
        with told(DataError, f"forget/others: the model cannot take item {index}"):
            loss = cross_entropy(model, rows(batch, torch.tensor([index])))
            slopes = torch.autograd.grad(loss, [moving[name] for name in names], allow_unused=True)
        whole = [torch.zeros_like(moving[n]) if s is None else s for n, s in zip(names, slopes, strict=True)]
        found.append([float(_cosine(whole, [d[name] for name in names])) for d in directions])
    return np.array(found)


def noise_like(change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random direction with the norm of the change in every tensor."""
    return {name: torch.randn_like(d) * (d.norm() / max(d.numel(), 1) ** 0.5) for name, d in change.items()}


class Matching:
    """The search for inputs whose gradient points where the weights went.

    Args:
        model: at the weights before, in eval mode.
        gone: the forget items; only their shape and what they look like on the average is used in the search.
        new: other items, which the attacker knows: they tell the range of an input.
        iterations: steps of Adam.
        lr: the first step, in the width of that range; falls to 0.
        smooth: weight of the total variation.
    """

    def __init__(self, model: nn.Module, gone: object, new: object, iterations: int, lr: float, smooth: float) -> None:
        self.model, self.iterations, self.smooth = model, iterations, smooth
        known = split(new)[0]
        self.low, self.high = float(known.min()), float(known.max())
        self.lr = lr * max(self.high - self.low, 1e-6)
        self.shape, self.spread, self.start = known.shape[1:], known.std(), known.mean(0)
        self.middle = (known.mean(0) + split(gone)[0].mean(0)) / 2
        self.targets = split(gone)[1]

    def search(self, change: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, float]:
        """Inputs, shape (count, *item), and the cosine reached; draws from torch's generator of the device."""
        wanted, parameters = list(change.values()), dict(self.model.named_parameters())
        moving = [parameters[name] for name in change]
        device = self.start.device
        labels = labels.to(device).reshape(-1, *[1] * (self.targets.dim() - 1)).expand(-1, *self.targets.shape[1:])
        noise = torch.randn(len(labels), *self.shape, device=device, dtype=self.start.dtype)
        x = (self.start + 0.1 * self.spread * noise).clamp(self.low, self.high).requires_grad_()
        optimizer = torch.optim.Adam([x], self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        best, kept = -2.0, x.detach().clone()
        for _ in range(self.iterations + 1):
            match, x.grad = self._match(x, labels, moving, wanted)
            if match > best:
                best, kept = match, x.detach().clone()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.clamp_(self.low, self.high)
        return kept, best

    def similarity(self, found: Tensor, batch: object) -> np.ndarray:
        """Of each item the cosine with the reconstruction most like it, both less the mean item, shape (n,)."""
        ours, theirs = ((each - self.middle).flatten(1).double() for each in (found, split(batch)[0]))
        cosines = functional.normalize(theirs, dim=1) @ functional.normalize(ours, dim=1).T
        nearest: np.ndarray = cosines.max(1).values.detach().cpu().numpy()
        return nearest

    def _match(
        self, x: Tensor, labels: Tensor, moving: list[nn.Parameter], wanted: list[Tensor]
    ) -> tuple[float, Tensor]:
        """The cosine, and the gradient of what is minimised."""
        with told(ModelError, "before: cannot be differentiated twice, which the attack needs"):
            logits, targets = logits_and_targets(self.model, (x, labels))
            loss = functional.cross_entropy(logits, targets)
            slopes = torch.autograd.grad(loss, moving, create_graph=True, allow_unused=True)
            pairs = [(slope, d) for slope, d in zip(slopes, wanted, strict=True) if slope is not None]
            match = _cosine([slope for slope, _ in pairs], [d for _, d in pairs])
            (slope,) = torch.autograd.grad(self.smooth * _variation(x) - match, x)
            return float(match.detach()), slope


def _cosine(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    mine, theirs = (torch.cat([each.reshape(-1).double() for each in side]) for side in (a, b))
    cosine: Tensor = mine @ theirs / (mine.norm() * theirs.norm() + TINY)
    return cosine


def _variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in an image; 0 for what has no rows and columns."""
    if x.dim() < 4:
        return x.new_zeros(())
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
