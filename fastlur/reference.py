"""The vector operations of a step in plain torch: the truth for every other backend, and the default one.

All operations take lists of tensors (a flat buffer is a list of one). Tensors at the same place of two lists have the
same shape, dtype and device; different places may differ in all three. Hyper-parameters arrive as float64 tensors on
the device of the data, so that nothing here ever waits for it.

Contiguous tensors are worked on in pieces that stay in the cache: a chain of elementwise operations then reads and
writes main memory once, and no temporary is ever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 17  # elements; half a mebibyte of float32, several of which fit a core's second-level cache
PIECE_GPU = 1 << 25

# Places in the vector of hyper-parameters that `meta_update` and `regularize` read.
LR, MOMENTUM, BETA2, EPS, WEIGHT_DECAY, L1, PROX, CLIP = range(8)
HYPER = 8

# Places in the vector that `step_control` writes and `meta_update` reads.
OK, COUNT, SCALE = range(3)
CONTROL = 3


def pieces(*lists: Sequence[Tensor] | None) -> Iterator[list[Any]]:
    """Walk lists of tensors side by side, in pieces that fit the cache where all are contiguous."""
    present = next(each for each in lists if each is not None)
    for index in range(len(present)):
        tensors = [None if each is None else each[index] for each in lists]
        held = [tensor for tensor in tensors if tensor is not None]
        if not all(tensor.is_contiguous() for tensor in held):
            yield tensors
            continue
        size = PIECE if held[0].device.type == "cpu" else PIECE_GPU
        flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
        for start in range(0, held[0].numel(), size):
            yield [None if tensor is None else tensor[start : start + size] for tensor in flat]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which it is computed with: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨a,b⟩, ‖a‖² and ‖b‖²: in total, shape (3,), and per tensor, shape (len(a), 3), both float64."""
    rows = []
    for x, y in zip(a, b, strict=True):
        x, y = wide(x.reshape(-1)), wide(y.reshape(-1))
        rows.append(torch.stack((torch.dot(x, y), torch.dot(x, x), torch.dot(y, y))).double())
    device = a[0].device if len(a) else None
    each = torch.stack(rows) if rows else torch.zeros(0, 3, dtype=torch.float64, device=device)
    return each.sum(0), each


def displace(
    out: Sequence[Tensor], theta: Sequence[Tensor], d: Sequence[Tensor], alpha: Tensor, norm2: Tensor | None = None
) -> None:
    """out ← θ − αd; with `norm2` = ‖v‖² of some v, α is divided by ‖v‖, and is 0 where that norm is 0."""
    if norm2 is not None:
        alpha = torch.where(norm2 > 0, alpha * norm2.rsqrt(), 0.0)
    for o, t, v in pieces(out, theta, d):
        step = wide(v) * alpha
        if o.dtype == step.dtype:
            torch.sub(t, step, out=o)
        else:
            o.copy_(wide(t) - step)


def step_control(control: Tensor, dots: Tensor, losses: Tensor, hyper: Tensor) -> None:
    """Decide, on the device, whether and how far a step goes; `control` is changed in place.

    control[OK] falls to 0 for good once a loss or a norm is not finite; control[COUNT] counts the steps taken;
    control[SCALE] is the factor that brings ‖a + u‖ down to the clipping norm (1 where the clip is 0, meaning none).
    """
    finite = torch.isfinite(dots.sum() + losses.sum())
    control[OK].mul_(finite)
    control[COUNT].add_(control[OK])
    # ‖a + u‖² from the three numbers at hand; rounding may leave it below zero where a and −u nearly cancel
    norm = (dots[1] + 2 * dots[0] + dots[2]).clamp(min=0).sqrt()
    clip = hyper[CLIP]
    control[SCALE].copy_(torch.where((clip > 0) & (norm > clip), clip / norm, 1.0))


def penalty(
    theta: Tensor, theta0: Tensor | None, fisher: Tensor | None, l2: Tensor, l1: Tensor, prox: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient, elementwise, and value, float64, of ½·l2‖θ‖² + l1‖θ‖₁ + ½·prox·Σ F (θ − θ₀)²."""
    gradient = theta * l2 + theta.sign() * l1
    value = 0.5 * l2 * theta.square().sum(dtype=torch.float64) + l1 * theta.abs().sum(dtype=torch.float64)
    if theta0 is not None:
        away = theta - wide(theta0)
        pull = away if fisher is None else away * wide(fisher)
        gradient = gradient + pull * prox
        value = value + 0.5 * prox * (pull * away).sum(dtype=torch.float64)
    return gradient, value


def regularize(
    grad: Sequence[Tensor],
    theta: Sequence[Tensor],
    theta0: Sequence[Tensor] | None,
    fisher: Sequence[Tensor] | None,
    hyper: Tensor,
) -> Tensor:
    """grad ← grad + ∇P(θ), P = ½·l2‖θ‖² + l1‖θ‖₁ + ½·prox·Σ F (θ − θ₀)²; returns P(θ), shape (), float64.

    l2, l1 and prox stand in `hyper` at WEIGHT_DECAY, L1 and PROX; without `fisher`, F = 1; without `theta0` the
    proximal term is absent.
    """
    total = torch.zeros((), dtype=torch.float64, device=hyper.device)
    for g, t, t0, f in pieces(grad, theta, theta0, fisher):
        gradient, value = penalty(wide(t), t0, f, hyper[WEIGHT_DECAY], hyper[L1], hyper[PROX])
        g.copy_(wide(g) + gradient)
        total += value
    return total


def meta_update(
    theta: Sequence[Tensor],
    a: Sequence[Tensor],
    u: Sequence[Tensor] | None,
    moment1: Sequence[Tensor],
    moment2: Sequence[Tensor] | None,
    theta0: Sequence[Tensor] | None,
    fisher: Sequence[Tensor] | None,
    mask: Sequence[Tensor] | None,
    control: Tensor,
    hyper: Tensor,
) -> None:
    """One optimizer step along a + u: clip, regularise, mask, then SGD with momentum or AdamW, in place.

    With `moment2` None the rule is SGD (m ← μm + g, θ ← θ − lr·m; weight decay is part of g); otherwise AdamW (weight
    decay beside the gradient, bias correction from control[COUNT]). Where `mask` is False, and everywhere when
    control[OK] is 0, neither weights nor moments change. The L1 and the proximal term join g, unclipped.
    """
    ok = control[OK] > 0
    lr, beta1, beta2, eps = hyper[LR], hyper[MOMENTUM], hyper[BETA2], hyper[EPS]
    decay, none = hyper[WEIGHT_DECAY], torch.zeros_like(hyper[LR])
    correction1 = 1 - beta1 ** control[COUNT]
    correction2 = 1 - beta2 ** control[COUNT]
    for t, x, y, m1, m2, t0, f, keep in pieces(theta, a, u, moment1, moment2, theta0, fisher, mask):
        weight = wide(t)
        g = (wide(x) if y is None else wide(x) + wide(y)) * control[SCALE]
        g = g + penalty(weight, t0, f, decay if m2 is None else none, hyper[L1], hyper[PROX])[0]
        first = wide(m1)
        if m2 is None:
            first = first * beta1 + g
            moved = weight - first * lr
        else:
            first = first * beta1 + g * (1 - beta1)
            second = wide(m2) * beta2 + g.square() * (1 - beta2)
            away = (first / correction1) / ((second / correction2).sqrt() + eps)
            moved = weight * (1 - lr * decay) - away * lr
        write = ok if keep is None else ok & keep.bool()
        t.copy_(torch.where(write, moved, weight))
        m1.copy_(torch.where(write, first, wide(m1)))
        if m2 is not None:
            m2.copy_(torch.where(write, second, wide(m2)))


def projection(dots: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The factors (s, t) of `project`, from dots = (⟨a,b⟩, ‖a‖², ‖b‖²); both are 0 where there is no conflict."""
    ab, aa, bb = dots[0], dots[1], dots[2]
    none = torch.zeros_like(ab)
    if kind == "scissorhands":
        return none, torch.where(ab < 0, (-ab / (aa + 1e-3)).clamp(min=0.5), none)
    t = torch.where((ab < 0) & (aa > 0), -ab / aa, none)
    if kind == "one_sided":
        return none, t
    if kind == "symmetric":
        return torch.where((ab < 0) & (bb > 0), -ab / bb, none), t
    raise ValueError(f"kind={kind!r} is no projection; use 'one_sided', 'symmetric' or 'scissorhands'")


def project(a: Sequence[Tensor], b: Sequence[Tensor], dots: Tensor, kind: str) -> None:
    """Remove the conflict between a and b, in place: a ← a + s·b and b ← b + t·a, both from the values given.

    "one_sided" takes from b what points against a (s = 0); "symmetric" takes from each what points against the other;
    "scissorhands" adds max(½, −⟨a,b⟩/(‖a‖² + 10⁻³))·a to b, a being the memory's gradient. Where ⟨a,b⟩ ≥ 0 nothing
    changes.
    """
    s, t = projection(dots, kind)
    for x, y in pieces(a, b):
        left, right = wide(x), wide(y)
        moved = left + right * s if kind == "symmetric" else None
        y.copy_(right + left * t)
        if moved is not None:
            x.copy_(moved)


def extrapolate(
    theta: Sequence[Tensor], theta0: Sequence[Tensor], memorised: Sequence[Tensor], alpha: Tensor, eta: Tensor
) -> None:
    """θ ← η((1 + α)θ₀ − αθ_mem) + (1 − η)θ; at η = 1 the θ given is not used."""
    for t, t0, m in pieces(theta, theta0, memorised):
        away = wide(t0) * (1 + alpha) - wide(m) * alpha
        t.copy_(torch.where(eta == 1, away, away * eta + wide(t) * (1 - eta)))


def saliency(out: Sequence[Tensor], grad: Sequence[Tensor], theta: Sequence[Tensor] | None) -> None:
    """out ← |g·θ|, or |g| without `theta`."""
    for o, g, t in pieces(out, grad, theta):
        o.copy_((wide(g) if t is None else wide(g) * wide(t)).abs())


def threshold(scores: Sequence[Tensor], sparsity: float) -> Tensor:
    """The ⌊sparsity·N⌋-th smallest of all N scores (the smallest for 0), shape (), float64."""
    every = torch.cat([score.reshape(-1) for score in scores])
    return every.kthvalue(max(1, int(sparsity * every.numel()))).values.double()
