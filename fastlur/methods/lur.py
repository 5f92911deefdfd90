"""LUR: learning to unlearn while retaining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastlur import meta, ops
from fastlur.curvature import By
from fastlur.errors import ArgumentError, check_flags, nearest, number, unknown
from fastlur.methods.base import Cost, Direction, Recipe, State
from fastlur.passes import Loss, NormalizeBy, Passes, Which
from fastlur.space import Vector
from fastlur.targets import NoviceOrAscent
from fastlur.task import CLASSIFICATION

Order = Literal["retain_first", "forget_first"]
RELATIVE_DEFAULT = 0.1


@dataclass(frozen=True)
class LUR(Recipe):
    """Minimise both losses along a meta-gradient that aligns the forgetting and the retaining one.

    order="retain_first":  min L_r(θ) + λ L_f(θ − α∇L_r(θ))
    order="forget_first":  min λ L_f(θ) + L_r(θ − α∇(λL_f)(θ))

    Source: Patel & Qiu, "Learning to Unlearn while Retaining", arXiv 2503.06339; the objective is reconstructed (the
    paper's own equation was not at hand), the four ways to its gradient are described in `fastlur.meta`.

    Args:
        inner_lr: the inner step α ≥ 0. None: a relative step of 0.1, which fits models of any scale; a number is an
            absolute step (parameters per gradient) unless `relative_inner_lr` is set.
        forget_weight: λ ≥ 0, the factor on the forget loss. The default was chosen on
            MNIST for the default forget loss, `fastlur.targets.NoviceOrAscent` (docs/quality.md), together with the
            learning rate (0.1 for SGD) and the norm that directions are clipped to (1). All three hold for text and
            for other forget losses too, for which they were not chosen.
        gradient: "optimistic" (two passes a step, and one gradient kept), "secant" (three), "exact" (two and a
            Hessian-vector product) or "first_order" (two, half of the alignment).
        order: which loss makes the inner step.
        relative_inner_lr: the inner step has length `inner_lr` whatever the gradient's norm: α = inner_lr/‖∇‖, and for
            the second-order term inner_lr/‖u‖ where the outer gradient u is the longer one.
        keep_graph: for "exact": hold the inner gradient's graph until the Hessian-vector product. False: build it anew
            then, for another forward and backward and less memory while the outer gradient is taken.
        hessian: for "exact": the Hessian-vector product by "autograd", differentiating its own backward, or by "func",
            the transforms of torch.func, which was slower on every model that was measured (`bench/bench_exact.py`).
        trim: `fastlur.methods.Trim(…)` before the first step, as some published runs have it; None: no trim.
        mask: see `Recipe`.
        normalize_by: see `Recipe`; here it is "retain": what is forgotten is to be forgotten in use.

    Raises:
        ArgumentError: a value out of range, or an unknown mode or order.
    """

    inner_lr: float | None = None
    forget_weight: float = 0.3
    gradient: meta.Gradient = "optimistic"
    order: Order = "retain_first"
    relative_inner_lr: bool = False
    keep_graph: bool = True
    hessian: By = field(default="autograd", kw_only=True)
    normalize_by: NormalizeBy = field(default="retain", kw_only=True)

    name: ClassVar[str] = "lur"
    rates: ClassVar[dict[str, float]] = {"sgd": 0.1}
    max_grad_norm: ClassVar[float | None] = 1.0  # without it 0.1 is too much for a network without normalisation

    def __post_init__(self) -> None:
        meta.check_gradient(self.gradient)
        if self.inner_lr is not None:
            meta.check_inner_lr(self.inner_lr)
        for name, known in (
            ("order", get_args(Order)),
            ("hessian", get_args(By)),
            ("normalize_by", get_args(NormalizeBy)),
        ):
            if unknown(getattr(self, name), known):
                raise ArgumentError(f"{name}={getattr(self, name)!r} is unknown; {nearest(getattr(self, name), known)}")
        check_flags(relative_inner_lr=self.relative_inner_lr, keep_graph=self.keep_graph)
        if not number(self.forget_weight):
            raise ArgumentError(f"forget_weight={self.forget_weight!r} must be a finite number ≥ 0, such as 0.2")

    @property
    def cost(self) -> Cost:
        """Two passes, or what the mode takes; the two gradients and the displaced point."""
        again = self.gradient == "exact" and not self.keep_graph
        passes = 3 if self.gradient == "secant" or again else 2
        return Cost(passes=passes, products=int(self.gradient == "exact"), buffers=3)

    def default_forget_loss(self, task: str) -> Loss:
        """A novice's answers, or bounded ascent; of text bounded ascent by tokens."""
        return NoviceOrAscent() if task == CLASSIFICATION else super().default_forget_loss(task)

    def prepare(self, passes: Passes) -> LURState:
        """Allocate: the two gradients and the displaced point, a parameter-sized buffer each, whatever the mode."""
        relative = self.relative_inner_lr or self.inner_lr is None
        inner_lr = RELATIVE_DEFAULT if self.inner_lr is None else self.inner_lr
        return LURState(passes, self.order, self.gradient, inner_lr, relative, self.keep_graph, self.hessian)

    def direction(self, passes: Passes, state: LURState) -> Direction:
        """The aligned inner gradient and the outer one."""
        previous = state.inner_gradient if state.kept else None
        inner, outer = meta.direction(state, self.gradient, previous)
        state.kept = self.gradient == "optimistic"
        return Direction(inner, outer) if self.order == "retain_first" else Direction(outer, inner)


class LURState(State):
    """The arena of a rule over a module in flat storage, and the gradient that `optimistic` keeps.

    Vectors beyond parameters and optimizer: `inner_gradient`, `outer_gradient` and `point`. Once displaced along, the
    inner gradient is no longer needed and is overwritten by the next one.
    """

    def __init__(
        self,
        passes: Passes,
        order: Order,
        gradient: meta.Gradient,
        inner_lr: float,
        relative: bool,
        keep_graph: bool = True,
        hessian: By = "autograd",
    ) -> None:
        self.passes, self.relative, self.keep_graph, self.hessian = passes, relative, keep_graph, hessian
        self.first: Which = "retain" if order == "retain_first" else "forget"
        self.second: Which = "forget" if order == "retain_first" else "retain"
        self.inner_gradient = passes.space.vector()
        self.outer_gradient = passes.space.vector()
        self.point = passes.space.vector()
        self.kept = False
        self._inner_lr = torch.tensor(inner_lr, dtype=torch.float64, device=passes.space.device)

    def inner(self, at: Vector | None) -> Vector:
        """∇A, into its own buffer."""
        self.passes.gradient(self.first, self.inner_gradient, at)
        return self.inner_gradient

    def outer(self, at: Vector) -> Vector:
        """∇B, into its own buffer."""
        self.passes.gradient(self.second, self.outer_gradient, at)
        return self.outer_gradient

    def linearized(self) -> tuple[Vector, Callable[[Vector, Tensor | None], Vector]]:
        """∇A, and the Hessian's part of the direction; the displaced point is free by then and holds the product."""
        curvature = self.passes.linearize(self.first, self.inner_gradient, keep_graph=self.keep_graph, by=self.hessian)
        a, product, tensors = self.inner_gradient, self.point, self.passes.space.tensors

        def aligned(v: Vector, norm2: Tensor | None) -> Vector:
            curvature(v, product)
            values = tensors(a)
            ops.displace(values, values, tensors(product), self._inner_lr, norm2)
            return a

        return a, aligned

    def norm2(self, along: Vector) -> Tensor | None:
        """‖along‖² for a relative step."""
        if not self.relative:
            return None
        values = self.passes.space.tensors(along)
        return ops.grad_dot(values, values)[0][0]

    def displaced(self, along: Vector, norm2: Tensor | None) -> Vector:
        """θ − α · along, into the one displaced point."""
        space = self.passes.space
        point, theta, step = (space.tensors(vector) for vector in (self.point, space.theta, along))
        ops.displace(point, theta, step, self._inner_lr, norm2)
        return self.point

    def vectors(self) -> dict[str, Vector]:
        """The kept gradient, if there is one."""
        return {"inner_gradient": self.inner_gradient} if self.kept else {}

    def resume(self, names: Sequence[str]) -> dict[str, Vector]:
        """Take the kept gradient back, if there was one."""
        self.kept = "inner_gradient" in names
        return self.vectors()
