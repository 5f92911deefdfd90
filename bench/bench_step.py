"""The price of a step: LUR's four gradients against a plain two-loss step, on the demo's residual network.

Every figure is a ratio taken in one run, with the arms interleaved (A B A B …), since machines drift by more than the
differences that matter. No ratio is given when a step does not do what it should: the direction of `secant` and
`optimistic`, less the sum of the undisplaced gradients, must point where `exact` points.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import pytest
import torch
from torch.nn import functional

import fastlur
from fastlur.demo import residual_cnn
from fastlur.losses import cross_entropy, negative_cross_entropy

MODES = ("optimistic", "first_order", "secant", "exact")
BATCH = 64
ROUNDS = 7


@pytest.fixture(scope="module")
def job() -> tuple[torch.nn.Module, Any, Any]:
    torch.manual_seed(0)
    batch = lambda: (torch.rand(BATCH, 1, 16, 16), torch.randint(0, 10, (BATCH,)))  # noqa: E731
    return residual_cnn(), batch(), batch()


def bare(model: torch.nn.Module, optimizer: torch.optim.Optimizer, forget: Any, retain: Any) -> None:
    """Two plain backward passes, their sum, and torch's own SGD."""
    optimizer.zero_grad()
    cross_entropy(model, retain).backward()
    negative_cross_entropy(model, forget).backward()
    optimizer.step()


def alignment(model: torch.nn.Module, forget: Any, retain: Any, gradient: Any) -> torch.Tensor:
    """The direction of one step less the plain sum of the gradients."""
    parts = []
    for inner_lr in (0.1, 0.0):
        with fastlur.MetaStep(
            copy.deepcopy(model),
            forget_loss=negative_cross_entropy,
            lr=0.0,
            gradient=gradient,
            inner_lr=inner_lr,
            relative_inner_lr=True,
        ) as step:
            step(forget, retain)
            inner, outer = step.state.inner_gradient, step.state.outer_gradient
            parts.append(torch.cat([x + y for x, y in zip(inner.flats, outer.flats, strict=True)]))
    return parts[0] - parts[1]


@pytest.mark.parametrize("gradient", MODES)
def test_step(job: Any, gradient: Any, benchmark: Any) -> None:
    model, forget, retain = job
    # a smooth twin of the network: with ReLU the Hessian ignores kinks that a finite step feels
    smooth = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    if gradient != "first_order":  # which has only a part of the alignment, and says so
        truth = alignment(smooth, forget, retain, "exact")
        found = alignment(smooth, forget, retain, gradient)
        assert float(functional.cosine_similarity(truth, found, dim=0)) >= 0.9, "this step does not align"

    plain = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(plain.parameters(), 1e-3, momentum=0.9)
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    with fastlur.MetaStep(copy.deepcopy(model), forget_loss=negative_cross_entropy, lr=1e-3, gradient=gradient) as step:
        step(forget, retain)
        bare(plain, optimizer, forget, retain)
        for _ in range(ROUNDS):
            for arm, go in (
                ("bare", lambda: bare(plain, optimizer, forget, retain)),
                ("ours", lambda: step(forget, retain)),
            ):
                began = time.perf_counter()
                go()
                times[arm].append(time.perf_counter() - began)
        ratio = statistics.median(times["ours"]) / statistics.median(times["bare"])
        benchmark.extra_info["ratio_to_bare"] = round(ratio, 3)
        benchmark.pedantic(step, args=(forget, retain), rounds=3)
    print(f"\n{gradient}: {ratio:.2f} × a plain two-loss step (median of {ROUNDS}, interleaved)")
