"""No figure for a wrong step: what each mode makes of two batches against the same formulas in float64, plain autograd.

Of LUR three things are compared: the direction less the undisplaced sum of the gradients, the part that the method is
for (a fast step that does not align is not a result); that sum itself; and what the update moved. Of other methods it
is what a step moves, against the same step in float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from arms import OTHERS, stepping
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlur
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS
from fastlur.statistics import Statistics
from fastlur.virtual_norm import VirtualNorm, reference_of

RHO = 0.1  # length of the inner step
LEAST = {"fp32": 0.9, "bf16": 0.7}  # cosine of what displacement adds
LONGER = 0.5  # or shorter, in float32, than what displacement adds in float64
LEAST_SUM = {"fp32": 0.999, "bf16": 0.9}  # of the undisplaced sum
APART = 0.1  # the truth of a mode from that of `first_order`, as a part of its length: less would be rounding
FARTHER = 0.1  # or less far, a step of another method than in float64
MOVED = 1e-3  # what an update may miss lr times its direction by, as a part of it
FAR = 0.1  # of the weights' length, which that update is to move them, so that their rounding does not hide it
BY: dict[str, Any] = {"normalize_by": "own", "relative_inner_lr": True, "forget_loss": negative_cross_entropy}


def directions(
    model: nn.Module, forget: Any, retain: Any, mode: Any, precision: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """Ours: the direction of a second step at the same θ, less that with an inner step of length 0; and the latter."""
    parts = []
    for rho in (RHO, 0.0):
        with fastlur.MetaStep(
            copy.deepcopy(model), lr=0.0, gradient=mode, inner_lr=rho, precision=precision, **(BY | options)
        ) as step:
            for _ in range(2):  # the second is where `optimistic` differs from `secant`
                step(forget, retain)
            parts.append(_direction(step))
    return parts[0] - parts[1], parts[1]


def _direction(step: fastlur.MetaStep) -> Tensor:
    pairs = zip(step.state.inner_gradient.views, step.state.outer_gradient.views, strict=True)
    return torch.cat([(inner + outer).reshape(-1) for inner, outer in pairs]).double()


def moved(
    model: nn.Module, forget: Any, retain: Any, mode: Any, precision: str, length: float, **options: Any
) -> float:
    """How far a first step of SGD is from −lr times its direction, which is about so long, as a part of that."""
    model = copy.deepcopy(model)
    before = _weights(model)
    rate = FAR * float(before.norm()) / length
    with fastlur.MetaStep(model, lr=rate, gradient=mode, inner_lr=RHO, precision=precision, **(BY | options)) as step:
        step(forget, retain)
        wanted = -rate * _direction(step)
    return float((_weights(model) - before - wanted).norm() / wanted.norm())


def truth(model: nn.Module, forget: Any, retain: Any, mode: str, normalize_by: str = "own") -> tuple[Tensor, Tensor]:
    """The same two in float64."""
    model = copy.deepcopy(model).double().train()
    parameters = list(model.parameters())
    theta = [p.detach().clone() for p in parameters]

    def gradient(loss: Any, batch: Any, step: Tensor | None = None, graph: bool = False) -> Tensor:
        """∇loss at θ − step, one flat vector."""
        with torch.no_grad():
            pieces = [None] * len(theta) if step is None else step.split([t.numel() for t in theta])
            for p, t, piece in zip(parameters, theta, pieces, strict=True):
                p.copy_(t if piece is None else t - piece.view_as(t))
        with ExitStack() as stack:
            if normalize_by == "retain" and loss is negative_cross_entropy:
                stack.enter_context(Statistics(model).frozen())
                norms = VirtualNorm(model)
                stack.enter_context(norms.by(lambda: cross_entropy(model, reference_of(wide(retain)))))
            value = loss(model, wide(batch))
        found = torch.autograd.grad(value, parameters, create_graph=graph)
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
        return a + u - plain, plain
    if mode == "exact":
        with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            graph = gradient(cross_entropy, retain, None, True)
            product = torch.autograd.grad(graph @ u, parameters)
        return a - alpha * torch.cat([h.reshape(-1) for h in product]) + u - plain, plain
    return gradient(cross_entropy, retain, alpha * u) + u - plain, plain


def check(model: nn.Module, forget: Any, retain: Any, mode: str, precision: str, **options: Any) -> float:
    """The cosine of what displacement adds; raises where anything is not as in float64.

    The two halves of the alignment may point the same way, so that a cosine cannot tell one from both: ours must be
    nearer to its own truth than to that of `first_order`, too.

    Args:
        model: the weights; a copy is stepped.
        forget: a small batch, since the truth is in float64.
        retain: likewise.
        mode: an arm of LUR, as `arms` names them.
        precision: "fp32" or "bf16".
        **options: what else a `MetaStep` takes.

    Raises:
        AssertionError: with what is wrong.
    """
    return check_all(model, forget, retain, (mode,), precision, **options)[mode]


def check_all(
    model: nn.Module, forget: Any, retain: Any, modes: Iterable[str], precision: str, **options: Any
) -> dict[str, float]:
    """`check` of several arms; what they have in common is computed once."""
    true = functools.cache(functools.partial(truth, model, forget, retain))
    done: dict[Any, float] = {}
    found = {}
    for name in modes:
        mode, more = _mode(name, options)
        key = mode, tuple(sorted(more.items()))
        if key not in done:
            done[key] = _checked(model, forget, retain, mode, precision, more, true)
        found[name] = done[key]
    return found


def _checked(
    model: nn.Module,
    forget: Any,
    retain: Any,
    mode: str,
    precision: str,
    options: dict[str, Any],
    true: Callable[[str, str], tuple[Tensor, Tensor]],
) -> float:
    by = options.get("normalize_by", "own")
    ours, sum_of_ours = directions(model, forget, retain, mode, precision, **options)
    own, plain = true(mode, by)
    cosine, straight = _cosine(ours, own), _cosine(sum_of_ours, plain)
    assert cosine >= LEAST[precision], f"{mode} in {precision} does not align: cosine {cosine:.3f}"
    long = float(ours.norm() / own.norm())
    assert precision == "bf16" or abs(long - 1) <= LONGER, f"{mode} in {precision} is displaced {long:.2f} × as far"
    assert straight >= LEAST_SUM[precision], f"{mode} in {precision}: the gradients are others, cosine {straight:.3f}"
    if mode != "first_order":
        half, _ = true("first_order", by)
        apart = float((own - half).norm() / own.norm())
        assert apart >= APART, f"{mode} and first_order are too alike at these weights to be told apart: {apart:.3f}"
        assert (ours - own).norm() < (ours - half).norm(), f"{mode} in {precision} does not align: it is first_order"
    missed = moved(model, forget, retain, mode, precision, float(sum_of_ours.norm()), **options)
    assert missed <= MOVED, f"{mode} in {precision}: the update misses its direction by {missed:.1e}"
    return cosine


def check_others(
    model: nn.Module, forget: Any, retain: Any, names: Iterable[str], precision: str, **options: Any
) -> None:
    """Arms that are not LUR's: what a step moves is what the same step moves in float64.

    The formulas themselves are compared in tests/test_methods_geometry.py, test_methods_baselines.py and
    test_method_rules.py; steps in conflict in `conflict`. Nothing is trimmed here: a trim draws anew what it cuts.

    Args:
        model, forget, retain, precision, **options: as for `check`.
        names: of the arms.

    Raises:
        AssertionError: one goes another way, or another distance.
    """
    for name in names:
        ours = _walked(model, forget, retain, name, precision=precision, **options)
        true = _walked(copy.deepcopy(model).double(), wide(forget), wide(retain), name)
        cosine, long = _cosine(ours, true), float(ours.norm() / true.norm())
        assert cosine >= LEAST_SUM[precision], f"{name} in {precision} goes another way: cosine {cosine:.3f}"
        assert abs(long - 1) <= FARTHER, f"{name} in {precision} goes {long:.2f} × as far"


def _walked(model: nn.Module, forget: Any, retain: Any, name: str, **options: Any) -> Tensor:
    """What the second step of an arm adds to the weights."""
    kind, settings = OTHERS[name]
    method = METHODS[kind](**settings | ({"trim": None} if "trim" in settings else {}))
    model = copy.deepcopy(model)
    with stepping(model, method, forget, retain, **options) as step:
        step(forget, retain)
        before = _weights(model)
        step(forget, retain)
        return _weights(model) - before


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()


def wide(batch: Any) -> Any:
    """A batch in float64."""
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


def compared(model: nn.Module, forget: Any, retain: Any, mode: str, precision: str, **options: Any) -> float:
    """The cosine of what displacement adds, whatever it is."""
    mode, options = _mode(mode, options)
    ours, _ = directions(model, forget, retain, mode, precision, **options)
    own, _ = truth(model, forget, retain, mode, options.get("normalize_by", "own"))
    return _cosine(ours, own)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(functional.cosine_similarity(one, other, dim=0))


def _mode(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mode of an arm, and its options: `exact` without the graph kept, or statistics of retain items.

    A target is another loss, and a loss is taken as it is: the arm that has one is checked with gradient ascent.
    """
    mode, _, variant = name.partition(", ")
    lent = {"normalize_by": "retain"}
    more = {"graph made anew": {"keep_graph": False}, "normalized by retain items": lent, "as it comes": lent}
    return mode, options | more.get(variant, {})
