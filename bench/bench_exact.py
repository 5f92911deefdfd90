"""The exact gradient by every way that was thought of: ∇A, ∇B and the Hessian's product with ∇B, without an update.

What they have in common is checked first: a way that gives another product has no figure. The step itself takes
`autograd, ours`; FASTLUR_BENCH_FULL=1 measures 16 + 16 images of a ResNet-18, the short form 2 + 2.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import models
import pytest
import torch
from measure import interleaved, medians, ratio
from models import MODELS, Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.passes import Passes
from fastlur.space import ParameterSpace

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
ITEMS, SECONDS = (16, 90.0) if FULL else (2, 10.0)
Arm = Callable[[], list[Tensor]]


def by_hand(model: nn.Module, forget: Any, retain: Any) -> dict[str, Arm]:
    """Without this package: the tensors of ∇A, then those of Hu, u = ∇B."""
    model = copy.deepcopy(model).train()
    parameters = dict(model.named_parameters())
    leaves = list(parameters.values())

    def gradient(loss: Any, batch: Any, graph: bool = False) -> list[Tensor]:
        return list(torch.autograd.grad(loss(model, batch), leaves, create_graph=graph))

    def value(at: dict[str, Tensor]) -> Tensor:
        state = at | {name: buffer.clone() for name, buffer in model.named_buffers()}  # which a forward moves
        return cross_entropy(lambda x: torch.func.functional_call(model, state, (x,)), retain)

    def bare() -> list[Tensor]:
        return gradient(cross_entropy, retain) + gradient(negative_cross_entropy, forget)

    def twice(context: Callable[[], Any] = nullcontext) -> list[Tensor]:
        with context():
            a = gradient(cross_entropy, retain, graph=True)
            u = gradient(negative_cross_entropy, forget)
            return [x.detach() for x in a] + list(torch.autograd.grad(a, leaves, u))

    def tangents() -> list[Tensor]:
        u = dict(zip(parameters, gradient(negative_cross_entropy, forget), strict=True))
        here = {name: p.detach() for name, p in parameters.items()}
        a, hu = torch.func.jvp(torch.func.grad(value), (here,), (u,))
        return [*a.values(), *hu.values()]

    return {
        "bare": bare,
        "autograd, torch's derivatives": twice,
        "autograd, torch's derivatives, checkpointed": lambda: twice(lambda: checkpointed(model)),
        "func: jvp of grad": tangents,
    }


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, the model's blocks forget their activations and make them again."""
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    for block in blocks:
        block.forward = lambda x, block=block: checkpoint(type(block).forward, block, x, use_reentrant=False)  # type: ignore[method-assign,misc]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def ours(model: nn.Module, forget: Any, retain: Any) -> Iterator[dict[str, Arm]]:
    """By the passes of this package."""
    space = ParameterSpace(copy.deepcopy(model))
    losses = {"retain": cross_entropy, "forget": negative_cross_entropy}
    passes = Passes(space, losses, {"retain": 1.0, "forget": 1.0})  # type: ignore[arg-type]
    a, u, hu = space.vector(), space.vector(), space.vector()

    def product(**options: Any) -> list[Tensor]:
        with passes.of_step(1, forget, retain):
            pull = passes.linearize("retain", a, **options)
            passes.gradient("forget", u)
            pull(u, hu)
        return a.views + hu.views

    try:
        yield {
            "autograd, ours": product,
            "autograd, ours, graph made anew": lambda: product(keep_graph=False),
            "func: vjp of grad": lambda: product(by="func"),
        }
    finally:
        space.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own forward mode imports deprecated parts of torch
def test_exact(benchmark: Any, record: list[dict[str, Any]]) -> None:
    _, batch = MODELS["resnet18"]
    model, forget, retain = models.model("resnet18"), batch(ITEMS, 0), batch(ITEMS, 1)
    with ours(model, forget, retain) as mine:
        arms = by_hand(model, forget, retain) | mine
        wanted = torch.cat([x.reshape(-1) for x in arms["autograd, torch's derivatives"]()])
        for name, arm in arms.items():
            if name != "bare":
                found = torch.cat([x.reshape(-1) for x in arm()])
                assert float((found - wanted).norm() / wanted.norm()) < 1e-3, name
        times = interleaved(arms, SECONDS)
        benchmark.pedantic(arms["autograd, ours"], rounds=1)
    row = {
        "model": "resnet18",
        "batch": ITEMS,
        "rounds": len(times["bare"]),
        "bare_seconds": round(medians(times)["bare"], 5),
        "ratio_to_bare": {arm: [round(x, 3) for x in ratio(times, arm, "bare")] for arm in times if arm != "bare"},
    }
    record.append(row)
    benchmark.extra_info.update(row)
    print(f"\nResNet-18, batch {ITEMS} + {ITEMS}, passes of an exact step, × a plain two-loss step's:")
    for arm, (middle, low, high) in row["ratio_to_bare"].items():  # type: ignore[attr-defined]
        print(f"  {arm}: {middle:.2f} [{low:.2f}, {high:.2f}]")
