"""The steps that are compared, each on a model of its own: a function that makes one step, update included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

import fastlur
from fastlur.data import Feed, source
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS
from fastlur.step import Step

Arm = Callable[[], object]
MODES = ("optimistic", "secant", "first_order", "exact")
OTHERS = {
    "joint": ("neggrad_plus", {}),
    "pcgrad": ("pcgrad", {}),
    "salun": ("salun", {}),
    "scissorhands, cleaned": ("scissorhands", {}),
    "scissorhands, as published": ("scissorhands", {"form": "as_published"}),
}
LR, MOMENTUM = 1e-4, 0.9


def bare(model: nn.Module, forget: Any, retain: Any, precision: str) -> Arm:
    """What all ratios are to: two plain backward passes, their sum, and torch's own SGD with momentum."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    device = next(model.parameters()).device.type

    def step() -> None:
        optimizer.zero_grad()
        for loss, batch in ((cross_entropy, retain), (negative_cross_entropy, forget)):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
                value = loss(model, batch)
            value.backward()
        optimizer.step()

    return step


@contextmanager
def arms(
    model: nn.Module, forget: Any, retain: Any, precision: str, names: tuple[str, ...]
) -> Iterator[dict[str, Arm]]:
    """The steps by name, open together."""
    with ExitStack() as stack:
        made: dict[str, Arm] = {"bare": bare(model, forget, retain, precision)}
        for name in names:
            method = fastlur.LUR(gradient=name) if name in MODES else other(name)  # type: ignore[arg-type]
            if method is None:
                continue
            sources = {
                "forget": source(forget, "forget", len(forget[0])),
                "retain": source(retain, "retain", len(retain[0])),
            }
            step = stack.enter_context(
                Step(
                    copy.deepcopy(model),
                    method,
                    {"retain": cross_entropy, "forget": negative_cross_entropy},
                    lr=LR,
                    momentum=MOMENTUM,
                    precision=precision,
                    feed=Feed(sources, 0, next(model.parameters()).device),
                    steps=1000,
                )
            )
            made[name] = lambda step=step: step(forget, retain)  # type: ignore[misc]
        yield made


def other(name: str) -> Any:
    """Another method with its defaults, or None where it is not there."""
    method, settings = OTHERS[name]
    return METHODS[method](**settings) if method in METHODS else None
