"""The steps that are compared, each on a model of its own: a function that makes one step, update included."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import fastlur
from fastlur import targets
from fastlur.data import Feed, source
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.passes import Loss, Passes
from fastlur.step import Step

Arm = Callable[[], object]
MODES = ("optimistic", "secant", "first_order", "exact")
FRUGAL = "exact, graph made anew"
LENT = "optimistic, normalized by retain items"  # where there is batch norm; the others by their own batch
AS_IT_COMES = "optimistic, as it comes"  # the same towards a novice's answers, which are asked for in every step
BORROWING = (LENT, AS_IT_COMES)
ONCE: dict[str, Any] = {"batches": 1}  # no more for what is done before the first step, which is no part of a step
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("neggrad_plus", {}),
    "pcgrad": ("pcgrad", {}),
    "salun": ("salun", {"mask": SaliencyMask(**ONCE)}),
    "scissorhands, cleaned": ("scissorhands", {"trim": Trim(**ONCE)}),
    "scissorhands, as published": ("scissorhands", {"form": "as_published", "trim": Trim(**ONCE)}),
}
FORMS = tuple(name for name in OTHERS if name.startswith("scissorhands"))
PARTED = {"cleaned": "cleaned", "as_published": "as published"}  # `form` of ScissorHands, and in words
FEW = ("optimistic", AS_IT_COMES, "secant", "exact", *FORMS)  # for the short forms
LR, MOMENTUM = 1e-4, 0.9
EPOCH = 500  # batches; what is done once an epoch falls into the warm-up


class Novice(targets.NoviceOrAscent):
    """LUR's default target, taken whatever it has learned in two steps: an answer costs the same."""

    def prepare(self, passes: Passes) -> Loss:
        """Hardly train it."""
        return replace(self, epochs=2 / EPOCH).judged(passes, math.inf)


def bare(
    model: nn.Module, forget: Any, retain: Any, precision: str, memory_format: Any = None, compile: bool = False
) -> Arm:
    """What all ratios are to: two plain backward passes, their sum, and torch's own SGD with momentum."""
    model = copy.deepcopy(model).train()
    if memory_format is not None:
        model, forget, retain = (_laid(each, memory_format) for each in (model, forget, retain))
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    device = next(model.parameters()).device.type
    forward = torch.compile(model) if compile else model

    def step() -> None:
        optimizer.zero_grad()
        for loss, batch in ((cross_entropy, retain), (negative_cross_entropy, forget)):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
                value = loss(forward, batch)
            value.backward()
        optimizer.step()

    return step


@contextmanager
def arms(
    model: nn.Module, forget: Any, retain: Any, precision: str, names: tuple[str, ...], **options: Any
) -> Iterator[dict[str, Arm]]:
    """The steps by name, open together."""
    with ExitStack() as stack:
        made: dict[str, Arm] = {"bare": bare(model, forget, retain, precision, **options)}
        for name in names:
            method = named(name)
            if method is None:
                continue
            more = {"forget_loss": aim(name), "precision": precision} | options
            step = stack.enter_context(opened(model, method, forget, retain, **more))
            made[name] = lambda step=step: step(forget, retain)  # type: ignore[misc]
        yield made


def opened(model: nn.Module, method: Any, forget: Any, retain: Any, **options: Any) -> Step:
    """A step over a copy of the model, within an epoch of many batches, all alike."""
    return stepping(copy.deepcopy(model), method, forget, retain, **options)


def stepping(
    model: nn.Module,
    method: Any,
    forget: Any,
    retain: Any,
    *,
    forget_batches: int = EPOCH,
    forget_loss: Loss = negative_cross_entropy,
    **options: Any,
) -> Step:
    """The same over the model itself; `forget_batches` is how many of the epoch's have forget data."""
    batches = {"forget": [forget] * forget_batches, "retain": [retain] * EPOCH}
    sources = {side: source(each, side, 1) for side, each in batches.items()}
    losses = {"retain": cross_entropy, "forget": forget_loss}
    feed = Feed(sources, 0, next(model.parameters()).device)  # type: ignore[arg-type]
    return Step(model, method, losses, lr=LR, momentum=MOMENTUM, feed=feed, steps=1000, **options)  # type: ignore[arg-type]


def named(name: str) -> Any:
    """The method of an arm, or None where it is not there."""
    return lur(name) if name.split(",")[0] in MODES else other(name)


def aim(name: str) -> Loss:
    """The forget loss of an arm."""
    return Novice() if name == AS_IT_COMES else negative_cross_entropy


def lur(name: str) -> fastlur.LUR:
    """LUR in the mode named."""
    mode, _, rest = name.partition(", ")
    by = "retain" if name in BORROWING else "own"
    return fastlur.LUR(gradient=mode, keep_graph=rest != "graph made anew", normalize_by=by)  # type: ignore[arg-type]


def other(name: str) -> Any:
    """Another method with its defaults, or None where it is not there."""
    method, settings = OTHERS[name]
    return METHODS[method](**settings) if method in METHODS else None


def _laid(value: Any, memory_format: torch.memory_format) -> Any:
    if isinstance(value, nn.Module):
        return value.to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs, targets = value
    return inputs.to(memory_format=memory_format), targets
