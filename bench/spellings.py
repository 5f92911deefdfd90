"""What a careful user of torch would write for each vector operation: several spellings, the best of which counts.

`v` is five vectors, lists of tensors of equal shapes: v[0] and v[1] are read, v[2] is written (weights, or an output),
v[3] and v[4] are moments. Each spelling computes what the operation in `operations.ours` computes, which is checked,
and returns what that returns, temporaries allocated beforehand where torch allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Arm = Callable[[], object]
Vectors = list[list[Tensor]]

ALPHA, LR, MOMENTUM, DECAY, L1, PROX = 0.1, 1e-3, 0.9, 1e-4, 1e-6, 1e-3
CLIP, SHARE = 1.0, 0.9
DOTS = (-0.5, 1.0, 1.0)
_each: Any = torch  # its _foreach functions are private to the type checker


def eager(name: str, v: Vectors) -> dict[str, Arm]:
    """The spellings without a compiler; "foreach" is among them where torch has one."""
    return _EAGER[name](v)


def _grad_dot(v: Vectors) -> dict[str, Arm]:
    pairs = [(x.view(-1), y.view(-1)) for x, y in zip(v[0], v[1], strict=True)]

    def dot() -> tuple[Tensor, Tensor]:
        each = torch.stack(
            [f(p, q) for x, y in pairs for f, p, q in ((torch.dot, x, y), (torch.dot, x, x), (torch.dot, y, y))]
        )
        return each.view(-1, 3).sum(0), each.view(-1, 3)

    def foreach() -> tuple[Tensor, Tensor]:
        crossed = torch.stack([x.sum() for x in _each._foreach_mul(v[0], v[1])])
        norms = (torch.stack(_each._foreach_norm(x, 2)).square() for x in (v[0], v[1]))
        each = torch.stack((crossed, *norms), 1)
        return each.sum(0), each

    return {"dot": dot, "foreach": foreach}


def _displace(v: Vectors) -> dict[str, Arm]:
    """By _foreach in two launches: the sum that allocates its results is one, but they belong into `out`, which costs a
    copy and the same five elements."""

    def foreach() -> None:
        _each._foreach_copy_(v[2], v[0])
        _each._foreach_add_(v[2], v[1], alpha=-ALPHA)

    def out() -> None:
        for theta, d, o in zip(v[0], v[1], v[2], strict=True):
            torch.sub(theta, d, alpha=ALPHA, out=o)

    return {"foreach": foreach, "out=": out}


def _project(v: Vectors) -> dict[str, Arm]:
    dots = torch.tensor(DOTS, device=v[0][0].device)

    def factor() -> Tensor:
        return torch.where(dots[0] < 0, -dots[0] / dots[1], 0.0)

    def addcmul() -> None:  # the decision stays on the device
        t = factor()
        for a, b in zip(v[0], v[1], strict=True):
            b.addcmul_(a, t)

    def foreach() -> None:  # waits for the decision
        _each._foreach_add_(v[1], v[0], alpha=float(factor()))

    def on_device() -> None:
        _each._foreach_add_(v[1], _each._foreach_mul(v[0], factor()))

    return {"foreach": foreach, "addcmul": addcmul, "foreach, no wait": on_device}


def _regularize(v: Vectors) -> dict[str, Arm]:
    away = [torch.empty_like(x) for x in v[0]]

    def value(theta: list[Tensor], apart: list[Tensor]) -> Tensor:
        norms, lengths = _each._foreach_norm(theta, 2), _each._foreach_norm(theta, 1)
        n, length, d = (torch.stack(each) for each in (norms, lengths, _each._foreach_norm(apart, 2)))
        return (0.5 * DECAY * n * n + L1 * length + 0.5 * PROX * d * d).sum()

    def foreach() -> Tensor:
        _each._foreach_add_(v[2], v[0], alpha=DECAY)
        _each._foreach_add_(v[2], _each._foreach_sign(v[0]), alpha=L1)
        _each._foreach_copy_(away, v[0])
        _each._foreach_sub_(away, v[1])
        _each._foreach_add_(v[2], away, alpha=PROX)
        return value(v[0], away)

    def out() -> Tensor:
        for theta, theta0, gradient, apart in zip(v[0], v[1], v[2], away, strict=True):
            gradient.add_(theta, alpha=DECAY)
            gradient.add_(torch.sign(theta, out=apart), alpha=L1)
            gradient.add_(torch.sub(theta, theta0, out=apart), alpha=PROX)
        return value(v[0], away)

    return {"foreach": foreach, "out=": out}


def _optimizer(
    kind: Any, v: Vectors, state: dict[str, list[Tensor]], on_gpu: bool | None = None, **options: Any
) -> Arm:
    """A step of torch's own optimizer on v[2], its moments those of `v`, as they are before and after."""
    on_gpu = v[2][0].is_cuda if on_gpu is None else on_gpu
    parameters = [torch.nn.Parameter(x) for x in v[2]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    made = kind(parameters, lr=LR, weight_decay=DECAY, **options)
    for name, values in state.items():
        for parameter, value in zip(parameters, values, strict=True):
            made.state[parameter][name] = value

    def step() -> None:
        if on_gpu:  # one launch for all of them; memory comes from torch's cache
            for parameter, gradient in zip(parameters, _each._foreach_add(v[0], v[1]), strict=True):
                parameter.grad = gradient
        else:  # a call is no launch here, but new memory is faulted in page by page
            for a, u, gradient in zip(v[0], v[1], gradients, strict=True):
                torch.add(a, u, out=gradient)
        made.step()

    return step


def _sgd(v: Vectors) -> dict[str, Arm]:
    state = {"momentum_buffer": v[3]}
    return {
        how: _optimizer(torch.optim.SGD, v, state, momentum=MOMENTUM, **{how: True}) for how in ("foreach", "fused")
    }


def _adamw(v: Vectors) -> dict[str, Arm]:
    def arm(how: str) -> Arm:
        steps = [torch.zeros((), device=x.device if how == "fused" else "cpu") for x in v[2]]
        return _optimizer(torch.optim.AdamW, v, {"step": steps, "exp_avg": v[3], "exp_avg_sq": v[4]}, **{how: True})

    return {how: arm(how) for how in ("foreach", "fused")}


def _extrapolate(v: Vectors) -> dict[str, Arm]:
    def foreach() -> None:
        _each._foreach_copy_(v[2], v[0])
        _each._foreach_lerp_(v[2], v[1], -ALPHA)

    def lerp() -> None:
        for theta, theta0, memorised in zip(v[2], v[0], v[1], strict=True):
            torch.lerp(theta0, memorised, -ALPHA, out=theta)

    return {"foreach": foreach, "lerp out=": lerp}


def _saliency(v: Vectors) -> dict[str, Arm]:
    def foreach() -> None:
        _each._foreach_copy_(v[2], v[0])
        _each._foreach_mul_(v[2], v[1])
        _each._foreach_abs_(v[2])

    def out() -> None:
        for gradient, theta, o in zip(v[0], v[1], v[2], strict=True):
            torch.mul(gradient, theta, out=o).abs_()

    return {"foreach": foreach, "out=": out}


def _kth(scores: list[Tensor]) -> Tensor:
    every = torch.cat([x.view(-1) for x in scores])
    return torch.kthvalue(every, max(1, int(SHARE * every.numel()))).values


def _threshold(v: Vectors) -> dict[str, Arm]:
    return {"kthvalue": lambda: _kth(v[0])}


def _decide(ok: Tensor, count: Tensor, dots: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    ok = ok * torch.isfinite(dots.sum() + losses.sum())
    count.add_(ok)
    norm = (dots[1] + 2 * dots[0] + dots[2]).clamp(min=0).sqrt()
    return ok, torch.where(norm > CLIP, CLIP / norm, 1.0)


def decided(device: torch.device) -> tuple[Tensor, ...]:
    """What a step is decided from: whether all was well, steps so far, dots, losses; float64."""
    return tuple(torch.tensor(x, dtype=torch.float64, device=device) for x in (1.0, 0.0, DOTS, [1.0, 2.0]))


def _step_control(v: Vectors) -> dict[str, Arm]:
    return {"eager": partial(_decide, *decided(v[0][0].device))}


_EAGER: dict[str, Callable[[Vectors], dict[str, Arm]]] = {
    "grad_dot": _grad_dot,
    "displace": _displace,
    "project": _project,
    "regularize": _regularize,
    "sgd": _sgd,
    "adamw": _adamw,
    "extrapolate": _extrapolate,
    "saliency": _saliency,
    "threshold": _threshold,
    "step_control": _step_control,
}
OPERATIONS = tuple(_EAGER)


def compiled(name: str, held: list[Vectors], backend: str = "inductor") -> list[Arm]:
    """The operation as one function of lists through `torch.compile`, shapes fixed: an arm for each of the vectors."""
    device = held[0][0][0].device
    dots = torch.tensor(DOTS, device=device)
    count = torch.ones((), device=device)

    def grad_dot(a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, Tensor]:
        rows = [torch.stack(((x * y).sum(), (x * x).sum(), (y * y).sum())) for x, y in zip(a, b, strict=True)]
        each = torch.stack(rows)
        return each.sum(0), each

    def displace(out: list[Tensor], theta: list[Tensor], d: list[Tensor]) -> None:
        for o, x, y in zip(out, theta, d, strict=True):
            o.copy_(x - ALPHA * y)

    def project(a: list[Tensor], b: list[Tensor], dots: Tensor) -> None:
        t = torch.where(dots[0] < 0, -dots[0] / dots[1], 0.0)
        for x, y in zip(a, b, strict=True):
            y.copy_(y + t * x)

    def regularize(grad: list[Tensor], theta: list[Tensor], theta0: list[Tensor]) -> Tensor:
        values = []
        for g, x, x0 in zip(grad, theta, theta0, strict=True):
            away = x - x0
            g.copy_(g + DECAY * x + L1 * x.sign() + PROX * away)
            values.append(0.5 * DECAY * (x * x).sum() + L1 * x.abs().sum() + 0.5 * PROX * (away * away).sum())
        return torch.stack(values).sum()

    def sgd(theta: list[Tensor], a: list[Tensor], u: list[Tensor], m: list[Tensor]) -> None:
        for t, x, y, first in zip(theta, a, u, m, strict=True):
            first.copy_(MOMENTUM * first + x + y + DECAY * t)
            t.copy_(t - LR * first)

    def adamw(
        theta: list[Tensor], a: list[Tensor], u: list[Tensor], m: list[Tensor], s: list[Tensor], count: Tensor
    ) -> None:
        for t, x, y, first, second in zip(theta, a, u, m, s, strict=True):
            g = x + y
            first.copy_(0.9 * first + 0.1 * g)
            second.copy_(0.999 * second + 0.001 * g * g)
            away = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            t.copy_(t * (1 - LR * DECAY) - LR * away)

    def extrapolate(theta: list[Tensor], theta0: list[Tensor], memorised: list[Tensor]) -> None:
        for t, x0, x in zip(theta, theta0, memorised, strict=True):
            t.copy_(x0 * (1 + ALPHA) - ALPHA * x)

    def saliency(out: list[Tensor], grad: list[Tensor], theta: list[Tensor]) -> None:
        for o, g, t in zip(out, grad, theta, strict=True):
            o.copy_((g * t).abs())

    functions: dict[str, tuple[Callable[..., object], Callable[[Vectors], tuple[Any, ...]]]] = {
        "grad_dot": (grad_dot, lambda v: (v[0], v[1])),
        "displace": (displace, lambda v: (v[2], v[0], v[1])),
        "project": (project, lambda v: (v[0], v[1], dots)),
        "regularize": (regularize, lambda v: (v[2], v[0], v[1])),
        "sgd": (sgd, lambda v: (v[2], v[0], v[1], v[3])),
        "adamw": (adamw, lambda v: (v[2], v[0], v[1], v[3], v[4], count)),
        "extrapolate": (extrapolate, lambda v: (v[2], v[0], v[1])),
        "saliency": (saliency, lambda v: (v[2], v[0], v[1])),
        "threshold": (_kth, lambda v: (v[0],)),
        "step_control": (_decide, lambda v: decided(device)),
    }
    function, arguments = functions[name]
    torch._dynamo.reset()
    made = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    return [partial(made, *arguments(v)) for v in held]
