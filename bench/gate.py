"""No figure for a wrong step: the alignment of each mode against the same formulas in float64, by plain autograd.

What is compared is the direction less the undisplaced sum of the gradients, the part that the method is for. A fast
step that does not align is not a result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlur
from fastlur.losses import cross_entropy, negative_cross_entropy

RHO = 0.1  # length of the inner step
LEAST = {"fp32": 0.9, "bf16": 0.7}  # cosine
Gradient = Callable[[Tensor | None], Tensor]


def alignment(model: nn.Module, forget: Any, retain: Any, mode: Any, precision: str, **options: Any) -> Tensor:
    """Ours: the direction of a second step at the same θ, less that with an inner step of length 0."""
    parts = []
    for rho in (RHO, 0.0):
        with fastlur.MetaStep(
            copy.deepcopy(model),
            forget_loss=negative_cross_entropy,
            lr=0.0,
            gradient=mode,
            inner_lr=rho,
            relative_inner_lr=True,
            normalize_by="own",
            precision=precision,
            **options,
        ) as step:
            for _ in range(2):  # the second is where `optimistic` differs from `secant`
                step(forget, retain)
            pairs = zip(step.state.inner_gradient.views, step.state.outer_gradient.views, strict=True)
            parts.append(torch.cat([(inner + outer).reshape(-1) for inner, outer in pairs]).double())
    return parts[0] - parts[1]


def truth(model: nn.Module, forget: Any, retain: Any, mode: str) -> Tensor:
    """The same in float64."""
    model = copy.deepcopy(model).double().train()
    parameters = list(model.parameters())
    theta = [p.detach().clone() for p in parameters]

    def wide(batch: Any) -> Any:
        return tuple(x.double() if x.is_floating_point() else x for x in batch)

    def gradient(loss: Any, batch: Any, step: Tensor | None = None, graph: bool = False) -> Tensor:
        """∇loss at θ − step, one flat vector."""
        with torch.no_grad():
            pieces = [None] * len(theta) if step is None else step.split([t.numel() for t in theta])
            for p, t, piece in zip(parameters, theta, pieces, strict=True):
                p.copy_(t if piece is None else t - piece.view_as(t))
        found = torch.autograd.grad(loss(model, wide(batch)), parameters, create_graph=graph)
        return torch.cat([g.reshape(-1) for g in found])

    a = gradient(cross_entropy, retain)
    plain = a + gradient(negative_cross_entropy, forget)
    alpha = RHO / a.norm()
    if mode == "optimistic":  # what the first step kept
        u = gradient(negative_cross_entropy, forget, alpha * a)
        a = gradient(cross_entropy, retain, RHO / max(a.norm(), u.norm()) * u)
        alpha = RHO / a.norm()
    u = gradient(negative_cross_entropy, forget, alpha * a)
    alpha = RHO / max(a.norm(), u.norm())
    if mode == "first_order":
        return a + u - plain
    if mode == "exact":
        with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            graph = gradient(cross_entropy, retain, None, True)
            product = torch.autograd.grad(graph @ u, parameters)
        return a - alpha * torch.cat([h.reshape(-1) for h in product]) + u - plain
    return gradient(cross_entropy, retain, alpha * u) + u - plain


def check(model: nn.Module, forget: Any, retain: Any, mode: str, precision: str, **options: Any) -> float:
    """The cosine between the two; raises where it is too small, or where only half of the alignment is there.

    The two halves may point the same way, so that a cosine cannot tell one from both. In fp32, where rounding is
    smaller than a half, ours must then be nearer to its own truth than to that of `first_order`.
    """
    mode, options = _mode(mode, options)
    ours, own = alignment(model, forget, retain, mode, precision, **options), truth(model, forget, retain, mode)
    cosine = float(functional.cosine_similarity(ours, own, dim=0))
    assert cosine >= LEAST[precision], f"{mode} in {precision} does not align: cosine {cosine:.3f}"
    if precision == "fp32" and mode != "first_order":
        half = truth(model, forget, retain, "first_order")
        assert (ours - own).norm() < (ours - half).norm(), f"{mode} in {precision} does not align: it is first_order"
    return cosine


def compared(model: nn.Module, forget: Any, retain: Any, mode: str, precision: str, **options: Any) -> float:
    """The cosine between the two."""
    mode, options = _mode(mode, options)
    ours = alignment(model, forget, retain, mode, precision, **options)
    return float(functional.cosine_similarity(ours, truth(model, forget, retain, mode), dim=0))


def _mode(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mode of an arm, and its options: "exact, graph made anew" is `exact` without the graph kept."""
    mode, _, variant = name.partition(", ")
    return mode, options | {"keep_graph": False} if variant else options
