"""A model that has memory for so many items at a time, and what it does beside one that has enough."""

from __future__ import annotations

import copy

import torch
from helpers import blobs, run
from torch import nn


class Full(torch.autograd.Function):
    """Runs out of memory on the way back."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.short = len(x) > limit
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.short:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradient, None


class Hungry(nn.Module):
    """Has memory for so many items; a third layer makes the middle of a backward pass a place to fail in."""

    def __init__(self, limit=10**9, fails="forward", dropout=0.0, layer=None):
        super().__init__()
        self.limit, self.fails, self.calls = limit, fails, []
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop, self.layer = nn.Dropout(dropout), layer if layer is not None else nn.LayerNorm(8)
        self.double()

    def forward(self, x):
        self.calls.append(len(x))
        if self.fails == "forward" and len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        x = self.layer(torch.tanh(self.first(x)))
        if self.fails == "backward":
            x = Full.apply(x, self.limit)
        return self.third(self.drop(torch.tanh(self.second(x))))


def wide(n):
    return blobs(n, dtype=torch.float64)


def twins(limit, **more):
    """The same model twice, one of which has memory for `limit` items."""
    torch.manual_seed(1)
    model = Hungry(**more)
    short = copy.deepcopy(model)
    short.limit = limit
    return model, short


def memory_for(limit, steps=3, forget=12, retain=40, model=None, **options):
    """Runs of the same model with and without enough memory: both models, and the result of the latter."""
    torch.manual_seed(1)
    model = Hungry() if model is None else model
    data = wide(forget), wide(retain)
    short = copy.deepcopy(model)
    short.limit = limit
    options = {"steps": steps, "batch_size": 12} | options
    run(model, *data, **options)
    return model, short, run(short, *data, **options)
