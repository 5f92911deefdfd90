"""The vector operations of a step in plain torch: the truth for every other backend, and the default one.

All operations take lists of tensors (a flat buffer is a list of one). Tensors at the same place of two lists have the
same shape and dtype (a mask is bool); different places may differ. All are on one device, and so are the
hyper-parameters, float64 tensors, so that nothing here ever waits for it.

A penalty whose factor (l2, l1, prox) is 0 is absent: it adds nothing, even where its operands are infinite or NaN.

On the CPU tensors are worked on in pieces that stay in the cache: a chain of elementwise operations then reads and
writes main memory once, and no temporary is the size of the model. Where pieces end is told by sizes alone, and a sum
over one is left to one thread: the bits of a result do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

# Elements a piece. On the CPU: few enough for several pieces to stay in a core's cache, for a float32 sum to keep its
# digits, and for torch to work on each without waking other threads, as elementwise operations and `sum` do for more:
# hundreds of short parallel regions are a little faster on an idle machine, and hundreds of times slower on a busy one,
# where each waits for a thread to be scheduled. `torch.dot` is no use here: it wakes threads from some thousand
# elements on, and its bits then tell how many there were.
PIECE = 1 << 15
PIECE_GPU = 1 << 25

# Places in the vector of hyper-parameters that `meta_update` and `regularize` read.
LR, MOMENTUM, BETA2, EPS, WEIGHT_DECAY, L1, PROX, CLIP = range(8)
HYPER = 8

# Places in the vector that `step_control` writes and `meta_update` reads.
OK, COUNT, SCALE = range(3)
CONTROL = 3


def pieces(*lists: Sequence[Tensor] | None) -> Iterator[list[Any]]:
    """Walk lists of tensors side by side, in pieces that fit the cache."""
    given = [each for each in lists if each is not None]
    if len({len(each) for each in given}) > 1:
        raise ValueError(f"lists of {', '.join(str(len(each)) for each in given)} tensors; they go place by place")
    for index in range(len(given[0])):
        tensors = [None if each is None else each[index] for each in lists]
        held = [tensor for tensor in tensors if tensor is not None]
        size = PIECE if held[0].device.type == "cpu" else PIECE_GPU
        if all(tensor.is_contiguous() for tensor in held):
            flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
            for start in range(0, held[0].numel(), size):
                yield [None if tensor is None else tensor[start : start + size] for tensor in flat]
        else:
            yield from _cut(tensors, held[0].shape, size)


def _cut(tensors: list[Any], shape: torch.Size, size: int) -> Iterator[list[Any]]:
    """The same for tensors with gaps in memory: parts of them, cut along one dimension after the other."""
    if shape.numel() <= size:
        yield tensors
        return
    dim = next(place for place, length in enumerate(shape) if length > 1)
    rows = max(1, size * shape[dim] // shape.numel())
    for start in range(0, shape[dim], rows):
        length = min(rows, shape[dim] - start)
        parts = [None if tensor is None else tensor.narrow(dim, start, length) for tensor in tensors]
        yield from _cut(parts, torch.Size((*shape[:dim], length, *shape[dim + 1 :])), size)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which it is computed with: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """⟨a,b⟩, ‖a‖² and ‖b‖²: in total, shape (3,), and per tensor, shape (len(a), 3), both float64."""
    device = a[0].device if len(a) else "cpu"
    each = torch.zeros(len(a), 3, dtype=torch.float64, device=device)
    for row, x, y in zip(each, a, b, strict=True):
        parts = []
        for left, right in pieces([x], [y]):
            if x is y:  # a norm
                parts += [wide(left).square().sum()] * 3
                continue
            left, right = wide(left), wide(right)
            parts += [(left * right).sum(), left.square().sum(), right.square().sum()]
        if parts:
            torch.sum(torch.stack(parts).view(-1, 3), 0, dtype=torch.float64, out=row)
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
    finite = torch.isfinite(dots.sum() + losses.double().sum())
    control[OK].mul_(finite)
    control[COUNT].add_(control[OK])
    # ‖a + u‖² from the three numbers at hand; rounding may leave it below zero where a and −u nearly cancel
    norm = (dots[1] + 2 * dots[0] + dots[2]).clamp(min=0).sqrt()
    clip = hyper[CLIP]
    control[SCALE].copy_(torch.where((clip > 0) & (norm > clip), clip / norm, 1.0))


def present(factor: Tensor, term: Callable[[], Tensor]) -> Tensor:
    """A term, or 0 where its factor is 0: 0·∞ would be NaN."""
    value = host(factor)
    if value is None:
        return torch.where(factor != 0, term(), 0.0)
    return term() if value != 0 else torch.zeros_like(factor)


def penalty_gradient(
    theta: Tensor, theta0: Tensor | None, fisher: Tensor | None, l2: Tensor, l1: Tensor, prox: Tensor
) -> Tensor:
    """Gradient, elementwise, of ½·l2‖θ‖² + l1‖θ‖₁ + ½·prox·Σ F (θ − θ₀)²."""
    gradient = present(l2, lambda: theta * l2) + present(l1, lambda: theta.sign() * l1)
    if theta0 is None:
        return gradient
    away = theta - wide(theta0)
    return gradient + present(prox, lambda: (away if fisher is None else away * wide(fisher)) * prox)


def penalty(
    theta: Tensor, theta0: Tensor | None, fisher: Tensor | None, l2: Tensor, l1: Tensor, prox: Tensor
) -> Tensor:
    """Value, float64, shape (), of the same."""
    value = present(l2, lambda: 0.5 * l2 * theta.square().sum(dtype=torch.float64))
    value = value + present(l1, lambda: l1 * theta.abs().sum(dtype=torch.float64))
    if theta0 is None:
        return value
    away = theta - wide(theta0)
    pull = away if fisher is None else away * wide(fisher)
    return value + present(prox, lambda: 0.5 * prox * (pull * away).sum(dtype=torch.float64))


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
        terms = wide(t), t0, f, hyper[WEIGHT_DECAY], hyper[L1], hyper[PROX]
        g.copy_(wide(g) + penalty_gradient(*terms))
        total += penalty(*terms)
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
    decay, l1, prox = hyper[WEIGHT_DECAY], hyper[L1], hyper[PROX]
    lr, beta1, beta2, eps, scale = hyper[LR], hyper[MOMENTUM], hyper[BETA2], hyper[EPS], control[SCALE]
    l2 = decay if moment2 is None else torch.zeros_like(decay)
    number = control[COUNT].clamp(min=1)  # before `step_control` has counted a step, as in the first
    correction1 = 1 - beta1**number
    correction2 = 1 - beta2**number
    penalised = not (known(l2, 0) and known(l1, 0) and (theta0 is None or known(prox, 0)))
    clipped = not known(scale, 1)
    always = known(control[OK], 1)
    if known(control[OK], 0):
        return
    for t, x, y, m1, m2, t0, f, keep in pieces(theta, a, u, moment1, moment2, theta0, fisher, mask):
        weight, first = wide(t), wide(m1)
        g = wide(x) if y is None else wide(x) + wide(y)
        if clipped:
            g = g * scale
        if penalised:
            g = g + penalty_gradient(weight, t0, f, l2, l1, prox)
        if m2 is None:
            new1, new2 = first * beta1 + g, None
            moved = weight - new1 * lr
        else:
            new1 = first * beta1 + g * (1 - beta1)
            new2 = wide(m2) * beta2 + g.square() * (1 - beta2)
            away = (new1 / correction1) / ((new2 / correction2).sqrt() + eps)
            moved = weight * (1 - lr * decay) - away * lr
        for old, new in ((t, moved), (m1, new1), (m2, new2)):
            if old is None or new is None:
                continue
            if keep is not None:
                new = torch.where(keep, new, wide(old))
            old.copy_(new if always else torch.where(control[OK] > 0, new, wide(old)))


def host(value: Tensor) -> float | None:
    """A scalar's value where it is known: looked at only on the CPU, where looking waits for nothing."""
    return float(value) if value.device.type == "cpu" else None


def known(value: Tensor, wanted: float) -> bool:
    """Whether a scalar is known to have this value."""
    return host(value) == wanted


PROJECTIONS = ("one_sided", "symmetric", "scissorhands")


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
        by_s, by_t = s.to(left.dtype), t.to(left.dtype)  # before they are compared: a factor may round to 0
        moved = torch.where(by_s != 0, left + right * by_s, left) if kind == "symmetric" else None
        y.copy_(torch.where(by_t != 0, right + left * by_t, right))  # not + 0: nothing changes, infinite or not
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
    place = max(1, int(Fraction(str(sparsity)) * every.numel()))
    # on CUDA kthvalue has no deterministic form, and refuses to run where one is asked for; sorting has
    return smallest(every, place, every.is_cuda and torch.are_deterministic_algorithms_enabled()).double()


def smallest(values: Tensor, place: int, by_sorting: bool) -> Tensor:
    """The `place`-th smallest, counted from 1; NaN counts as largest. The values may come out in another order."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64) and not by_sorting:
        values.numpy().partition(place - 1)  # in place: kthvalue would take three times their memory beside them
        return values[place - 1]
    return values.sort().values[place - 1] if by_sorting else values.kthvalue(place).values
