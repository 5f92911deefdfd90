"""Models and small tools that several test files use."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlur
from fastlur import ops
from fastlur.operands import control_scalars, hyper_parameters

MODES = ("exact", "secant", "first_order", "optimistic")
ORDERS = ("retain_first", "forget_first")


CPU = torch.device("cpu")
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "l1": 0.01, "prox": 0.2, "clip": 1.0}


def decided(dots=(0.1, 2.0, 3.0), **hyper) -> tuple[Tensor, Tensor]:
    """Control scalars after one decision, and the hyper-parameters it was taken with."""
    control, packed = control_scalars(CPU), hyper_parameters(CPU, **(HYPER | hyper))
    ops.step_control(control, torch.tensor(dots, dtype=torch.float64), torch.ones(2), packed)
    return control, packed


class Interrupted(Exception):
    pass


class Noting(nn.Module):
    """A network that has a setting of its own, and notes something about itself in every forward."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.layer, self.p = mlp(), p
        self.calls, self.seconds = 0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seconds += time.perf_counter()
        return self.layer(functional.dropout(x, self.p, self.training))


def fill_disk(monkeypatch) -> None:
    """From here on there is no space left for what fastlur writes."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastlur.folder.os.fsync", full)


def of_both(model, go, directory, at: int = 4):
    """The weights after a run that nothing disturbs, and after the same one broken off after a step and made again.

    Args:
        model: as it is before both.
        go: makes the run, given more options of `unlearn`.
        directory: for checkpoints, of which there is one every two steps.
        at: the step.
    """
    start = copy.deepcopy(model.state_dict())
    go()
    whole = state(model)

    def breaks(event):
        if event.step == at:
            raise Interrupted

    model.load_state_dict(start)
    with pytest.raises(Interrupted):
        go(checkpoint=directory, checkpoint_every=2, callbacks=[breaks])
    model.load_state_dict(start)
    go(checkpoint=directory, checkpoint_every=2)
    return whole, state(model)


def interrupt(event):
    """A callback that breaks the run after its second step."""
    if event.step == 2:
        raise Interrupted


def learnable(n, classes=4):
    """Items whose class can be read off."""
    targets = torch.arange(n) % classes
    return torch.randn(n, 6) * 0.1 + torch.eye(6)[targets] * 3, targets


def images(n: int) -> tuple[Tensor, Tensor]:
    """n random digits-sized images and labels."""
    return torch.rand(n, 1, 8, 8), torch.randint(0, 10, (n,))


def run(model, forget=None, retain=None, **options):
    """A short `unlearn`."""
    options = {"steps": 3, "batch_size": 8, "progress": False} | options
    forget, retain = (images(n) if data is None else data for data, n in ((forget, 12), (retain, 20)))
    return fastlur.unlearn(model, forget, retain, **options)


class Point(nn.Module):
    """A model that is nothing but its parameters; losses are functions of them."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self) -> Tensor:
        return self.x


class Attention(nn.Module):
    """A small transformer with fused attention over 6 tokens; its embedding is tied to its output layer."""

    def __init__(self, words: int = 11, width: int = 16, classes: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, words, bias=False)
        self.out.weight = self.embed.weight
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.mix(x).chunk(3, dim=-1)
        split = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
        y = functional.scaled_dot_product_attention(*split, is_causal=True)
        return self.out(self.norm(x + y.transpose(1, 2).flatten(2)))


def mlp(inputs: int = 6, classes: int = 4, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = [nn.Linear(inputs, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, classes)]
    return nn.Sequential(*layers).to(dtype)


def blobs(n: int, inputs: int = 6, classes: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """n random items and labels."""
    return torch.randn(n, inputs, dtype=dtype), torch.randint(0, classes, (n,))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def direction(step: fastlur.MetaStep) -> dict[str, Tensor]:
    """The whole direction of the step just done, by parameter name."""
    inner, outer = step.state.inner_gradient, step.state.outer_gradient
    return {n: (x + y).clone() for n, x, y in zip(step.space.names, inner.views, outer.views, strict=True)}


def norm(vectors: dict[str, Tensor]) -> float:
    return float(torch.cat([v.reshape(-1) for v in vectors.values()]).norm())


def minus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: a[name] - b[name] for name in a}


class Growing(nn.Module):
    """One buffer appears in the first forward, one grows, one is registered on the way."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.register_buffer("late", None)
        self.register_buffer("log", torch.zeros(0))

    def forward(self, x):
        self.late = x.detach().mean(0)
        self.log = torch.cat((self.log, torch.ones(1)))
        if not hasattr(self, "extra"):
            self.register_buffer("extra", torch.zeros(()))
        self.extra += 1
        return self.body(x)
