"""The meta-gradient of LUR: the direction that minimises A(θ) + B(θ − α∇A(θ)), in four ways.

A is the inner loss and B the outer one; a = ∇A(θ), u = ∇B(θ − αa), H the Hessian of A at θ. Expanding B shows what the
composition is for: B(θ − αa) = B(θ) − α⟨∇A, ∇B⟩ + O(α²), so its minimisation aligns the two gradients.

    exact        a + u − αHu            two passes and a Hessian-vector product
    secant       ∇A(θ − αu) + u         three passes; exact + O(α²), and nothing is differentiated twice
    first_order  a + u                  two passes; keeps half of the alignment
    optimistic   w + u, u = ∇B(θ − αd), w = ∇A(θ − αu), d the w of the last step (∇A(θ) at the first)
                                        two passes; the whole alignment at the price of a plain two-loss step

Source: the objective is that of "Learning to Unlearn while Retaining" (Patel & Qiu, arXiv 2503.06339), reconstructed:
the paper's own equation was not at hand. `secant` (the Hessian-vector product as a finite difference along the outer
gradient itself) and `optimistic` (Popov's reuse of the last gradient, applied to it) are derived here.

Each rule is written once, over an `Arena` that knows how to take gradients and inner steps; one arena is a dict of
tensors and two functions of it (`meta_gradient`), the other a module in flat storage (fastlur/methods/lur.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from fastlur import ops
from fastlur.errors import ArgumentError, DataError, check_flags, nearest, not_scalar, number, unknown

Gradient = Literal["exact", "secant", "first_order", "optimistic"]
GRADIENTS: tuple[str, ...] = get_args(Gradient)
Params = dict[str, Tensor]
V = TypeVar("V")


class Arena(Protocol[V]):
    """Where a rule works. A vector returned here may be overwritten by the next call of the same function."""

    def inner(self, at: V | None) -> V:
        """∇A at a point (None: θ)."""
        ...

    def outer(self, at: V) -> V:
        """∇B at a point."""
        ...

    def linearized(self) -> tuple[V, Callable[[V, Tensor | None], V]]:
        """∇A at θ, and (v, norm2) ↦ ∇A(θ) − αHv, to be called once."""
        ...

    def norm2(self, along: V) -> Tensor | None:
        """What α is divided by the root of: ‖along‖², shape (), where the inner step is relative; otherwise None."""
        ...

    def displaced(self, along: V, norm2: Tensor | None) -> V:
        """θ − α · along, where α is the inner step, divided by the root of `norm2` if there is one."""
        ...


def exact(arena: Arena[V]) -> tuple[V, V]:
    """(a − αHu, u)."""
    a, aligned = arena.linearized()
    norm2 = arena.norm2(a)
    u = arena.outer(arena.displaced(a, norm2))
    return aligned(u, _longer(arena, norm2, u)), u


def secant(arena: Arena[V]) -> tuple[V, V]:
    """(∇A(θ − αu), u); α is one number for both displacements, unless u is the longer one of a relative step."""
    return optimistic(arena, None)


def first_order(arena: Arena[V]) -> tuple[V, V]:
    """(a, u)."""
    a = arena.inner(None)
    return a, arena.outer(arena.displaced(a, arena.norm2(a)))


def optimistic(arena: Arena[V], previous: V | None) -> tuple[V, V]:
    """(w, u): secant with the inner gradient of the last step in place of ∇A(θ), if there was one."""
    d = arena.inner(None) if previous is None else previous
    norm2 = arena.norm2(d)
    u = arena.outer(arena.displaced(d, norm2))
    return arena.inner(arena.displaced(u, _longer(arena, norm2, u))), u


def _longer(arena: Arena[V], norm2: Tensor | None, u: V) -> Tensor | None:
    """The larger of ‖∇A‖² and ‖u‖², so that a relative step displaces by its length at most along u as well.

    Divided by ‖∇A‖ alone α has no bound: a trained model hardly has a retain gradient, and would be evaluated worlds
    away (on digits, variances in the first layers rose a hundredfold in the third step, running statistics with them).
    """
    return None if norm2 is None else torch.maximum(norm2, arena.norm2(u))  # type: ignore[arg-type]


def direction(arena: Arena[V], gradient: Gradient, previous: V | None = None) -> tuple[V, V]:
    """The pair whose sum is the direction; its first member is what `optimistic` takes as `previous` the next time."""
    match gradient:
        case "exact":
            return exact(arena)
        case "secant":
            return secant(arena)
        case "first_order":
            return first_order(arena)
        case "optimistic":
            return optimistic(arena, previous)


def check_gradient(gradient: str) -> None:
    """Refuse a gradient mode that does not exist.

    Raises:
        ArgumentError: with the nearest name.
    """
    if unknown(gradient, GRADIENTS):
        raise ArgumentError(f"gradient={gradient!r} is no gradient mode; {nearest(gradient, GRADIENTS)}")


def check_inner_lr(inner_lr: float) -> None:
    """Refuse an inner step that is not a number ≥ 0.

    Raises:
        ArgumentError: it is not.
    """
    if not number(inner_lr):
        raise ArgumentError(f"inner_lr={inner_lr!r} must be a finite number ≥ 0, such as 0.01")


def meta_gradient(
    loss_inner: Callable[[Params], Tensor],
    loss_outer: Callable[[Params], Tensor],
    params: Params,
    inner_lr: float = 1e-2,
    gradient: Gradient = "exact",
    relative: bool = False,
    previous: Params | None = None,
) -> Params:
    """The direction that minimises A(θ) + B(θ − α∇A(θ)), for two losses that are functions of a dict of tensors.

    Example:
        >>> import torch, fastlur
        >>> theta = {"x": torch.tensor([1.0, 2.0])}
        >>> retain = lambda p: (p["x"] ** 2).sum() / 2
        >>> forget = lambda p: p["x"].sum()
        >>> fastlur.meta_gradient(retain, forget, theta, inner_lr=0.1)["x"]   # a + u − αHu = x + 1 − 0.1
        tensor([1.9000, 2.9000])

    Args:
        loss_inner: A, `params -> scalar`; the retain loss for LUR's order "retain_first".
        loss_outer: B, `params -> scalar`; the forget loss, weighted and to be minimised.
        params: θ, floating-point tensors of any shapes on one device; neither changed nor marked.
        inner_lr: α ≥ 0, in units of parameter per unit of gradient; with `relative` the length of the inner step.
        gradient: "exact", "secant", "first_order" or "optimistic" (see the module's docstring).
        relative: divide α by ‖∇A‖ (over all tensors), in −αHu by ‖u‖ where that is larger, so that no displacement is
            longer than `inner_lr`; held constant under differentiation. Where what it is divided by is 0, θ stays.
        previous: for "optimistic", ∇A of the last call. The dict is updated in place to this call's, so that one dict,
            empty at first, handed to every call is all the state there is. None: no memory, which is "secant".

    Returns:
        The whole direction, a dict with the keys, shapes and dtypes of `params`, detached.

    Raises:
        ArgumentError: unknown mode, negative `inner_lr`, `previous` with other keys or shapes, empty `params`.
        DataError: a loss is not a scalar.
    """
    check_gradient(gradient)
    check_inner_lr(inner_lr)
    _check_params(params, previous)
    check_flags(relative=relative)
    for name, loss in (("loss_inner", loss_inner), ("loss_outer", loss_outer)):
        if not callable(loss):
            raise ArgumentError(f"{name}={loss!r} cannot be called; it must take params and return a scalar")
    arena = _DictArena(loss_inner, loss_outer, {k: v.detach() for k, v in params.items()}, inner_lr, relative)
    with torch.inference_mode(False), torch.no_grad():
        inner, outer = direction(arena, gradient, previous or None)
        if previous is not None:
            previous.update(inner)
        return {name: inner[name] + outer[name] for name in params}


class _DictArena:
    """Two functions of a dict of tensors."""

    def __init__(
        self,
        loss_inner: Callable[[Params], Tensor],
        loss_outer: Callable[[Params], Tensor],
        theta: Params,
        inner_lr: float,
        relative: bool,
    ) -> None:
        self.theta, self.relative = theta, relative
        self._inner = torch.func.grad(_checked(loss_inner, "loss_inner"))
        self._outer = torch.func.grad(_checked(loss_outer, "loss_outer"))
        device = next(iter(theta.values())).device
        self._inner_lr = torch.tensor(inner_lr, dtype=torch.float64, device=device)

    def inner(self, at: Params | None) -> Params:
        return self._detached(self._inner(self.theta if at is None else at))

    def outer(self, at: Params) -> Params:
        return self._detached(self._outer(at))

    def linearized(self) -> tuple[Params, Callable[[Params, Tensor | None], Params]]:
        found: Any = torch.func.vjp(self._inner, self.theta)
        gradient, pull = found
        a = self._detached(gradient)

        def aligned(v: Params, norm2: Tensor | None) -> Params:
            (product,) = pull(v)
            return self._minus(a, self._detached(product), norm2)

        return a, aligned

    def norm2(self, along: Params) -> Tensor | None:
        values = list(along.values())
        return ops.grad_dot(values, values)[0][0] if self.relative else None

    def displaced(self, along: Params, norm2: Tensor | None) -> Params:
        return self._minus(self.theta, along, norm2)

    def _minus(self, base: Params, along: Params, norm2: Tensor | None) -> Params:
        out = {name: torch.empty_like(value) for name, value in base.items()}
        vectors = list(base.values()), [along[name] for name in base]
        ops.displace(list(out.values()), *vectors, self._inner_lr, norm2)
        return out

    @staticmethod
    def _detached(gradient: Any) -> Params:
        return {name: value.detach() for name, value in gradient.items()}


def _checked(loss: Callable[[Params], Tensor], name: str) -> Callable[[Params], Tensor]:
    def checked(params: Params) -> Tensor:
        value = loss(params)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise DataError(not_scalar(name, value))
        return value.reshape(())

    return checked


def _check_params(params: Params, previous: Params | None) -> None:
    if not isinstance(params, dict):
        raise ArgumentError(f"params: a {type(params).__name__} is no dict of tensors, as named parameters are")
    if not params:
        raise ArgumentError("params={} is empty; pass a dict of tensors, such as dict(model.named_parameters())")
    for name, value in params.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(f"params[{name!r}] is {kind}, not a floating-point tensor")
    if previous is not None and not isinstance(previous, dict):
        raise ArgumentError(f"previous: a {type(previous).__name__} is no dict; pass {{}} at first, or None")
    if previous:
        for name, value in params.items():
            if name not in previous or getattr(previous[name], "shape", None) != value.shape:
                raise ArgumentError(
                    f"previous: no tensor of shape {tuple(value.shape)} for {name!r}; pass {{}} at first"
                )
