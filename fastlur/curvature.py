"""A gradient and, once asked for, the Hessian-vector product of the same loss, sharing what they share.

Plain autograd, the default by measurement (bench/NOTES.md): the gradient is taken with its graph, which is then
differentiated along v. The gradient costs one pass and the product two, with the second derivatives of `fastlur.twice`.
`by="func"` does the same by torch.func's `vjp` of `grad`, more slowly. The choice is the caller's, never a clock's.

The graph outlives a swap of the parameters' storage (the outer gradient is taken at another point while it is kept). It
is therefore built over leaves of its own, views of θ that nothing repoints, and over copies of the model's buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlur.errors import ModelError, first_line, lacks_memory
from fastlur.graph import ends, nodes
from fastlur.space import ParameterSpace, Vector
from fastlur.twice import Twice

By = Literal["autograd", "func"]
Evaluate = Callable[[Callable[[Any, Any], Tensor]], Tensor]  # call(loss, batch) ↦ the checked loss
_ONCE = once_differentiable(lambda ctx: None).__code__  # that of everything it wraps
Pull = Callable[[Vector, Vector], None]


class Curvature:
    """∇ of a weighted loss at θ, and its Hessian's product with a vector.

    Attributes:
        loss: the loss, unweighted.
        gradient: one tensor a slot; None where the loss does not reach it.
        buffers: what the model's buffers would be after this forward, by name.

    Args:
        space: the moving parameters.
        evaluate: runs the loss: given `call(loss, batch)`, with the batch, the seed and the checks of the pass.
        weight: the factor on the loss.
        by: "autograd", or "func" for torch.func.
        buffers: the model's buffers to start from, by name; None: as they are.

    Raises:
        ModelError: the model cannot be differentiated twice.
    """

    def __init__(
        self,
        space: ParameterSpace,
        evaluate: Evaluate,
        weight: float,
        by: By = "autograd",
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        self._space, self._evaluate, self._weight = space, evaluate, weight
        self._start = dict(space.model.named_buffers()) if buffers is None else buffers
        self._evaluator = _Evaluator(space.model)
        self._leaves = [view.detach().requires_grad_() for view in space.theta.views]
        self._product = self._by_func() if by == "func" else self._by_autograd()

    def product(self, v: Vector, out: Vector) -> None:
        """out ← weight · Hessian · v, to be called once: the graph goes with it.

        Raises:
            ModelError: the model cannot be differentiated twice.
        """
        with refused():
            found = self._product(v.views)
        with torch.no_grad():
            put(found, out)

    def _value(self, leaves: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over these tensors in place of the parameters, and the buffers after it."""
        slots = self._space.slots
        # statistics move in copies: a graph, or a transform, must not see tensors that others write to
        moved = {f"model.{name}": buffer.clone() for name, buffer in self._start.items()}
        state = moved | {f"model.{n}": leaf for slot, leaf in zip(slots, leaves, strict=True) for n in slot.names}
        loss = self._evaluate(lambda own, batch: torch.func.functional_call(self._evaluator, state, (own, batch)))
        return loss, {name.removeprefix("model."): state[name].detach() for name in moved}

    def _by_autograd(self) -> Callable[[list[Tensor]], Sequence[Tensor | None]]:
        leaves = self._leaves
        # attention by its plain algorithm: the fused ones cannot be differentiated twice
        # and no checkpointing, which would run the model again where the leaves no longer stand in it
        hooks = torch.autograd.graph.disable_saved_tensors_hooks(
            "it recomputes or moves saved tensors, as checkpointing does"
        )
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), refused():
            with Twice(), hooks:
                loss, self.buffers = self._value(leaves)
            found = torch.autograd.grad(loss * self._weight, leaves, create_graph=True, allow_unused=True)
            _check_twice(found)
        self.loss = loss.detach()
        self.gradient: list[Tensor | None] = [None if each is None else each.detach() for each in found]
        outputs = [(i, each) for i, each in enumerate(found) if each is not None and each.requires_grad]

        def product(v: list[Tensor]) -> Sequence[Tensor | None]:
            if not outputs:  # linear in every parameter
                return [None] * len(leaves)
            along = [v[i] for i, _ in outputs]
            return torch.autograd.grad([each for _, each in outputs], leaves, along, allow_unused=True)

        return product

    def _by_func(self) -> Callable[[list[Tensor]], Sequence[Tensor | None]]:
        def value(leaves: list[Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            loss, buffers = self._value(leaves)
            return loss * self._weight, (loss.detach(), buffers)

        here = [leaf.detach() for leaf in self._leaves]
        with sdpa_kernel(SDPBackend.MATH), refused():
            found: Any = torch.func.vjp(torch.func.grad(value, has_aux=True), here, has_aux=True)
        gradient, pull, (self.loss, self.buffers) = found
        reached = self._reached()
        self.gradient = [each.detach() if i in reached else None for i, each in enumerate(gradient)]

        def product(v: list[Tensor]) -> Sequence[Tensor | None]:
            with torch.no_grad():  # otherwise a third graph is recorded
                return [each.detach() for each in pull(v, retain_graph=False)[0]]

        return product

    def _reached(self) -> set[int]:
        """The slots that the loss depends on, read off the graph of a forward: transforms do not tell.

        Nor do they tell of a function that is differentiable once, whose part of the product would be zero.
        """
        with torch.enable_grad(), refused():
            loss, _ = self._value(self._leaves)
            _check_once(loss)
        index = {id(leaf): i for i, leaf in enumerate(self._leaves)}
        return {index[id(leaf)] for leaf in ends(loss) if id(leaf) in index}


def put(found: Sequence[Tensor | None], out: Vector) -> None:
    """Copy tensors into a vector, zero where there is none."""
    if any(each is None for each in found):
        out.zero_()
    pairs = [(view, each) for view, each in zip(out.views, found, strict=True) if each is not None]
    if pairs:
        torch._foreach_copy_([view for view, _ in pairs], [each for _, each in pairs])


@contextmanager
def refused() -> Iterator[None]:
    """Inside, what torch cannot differentiate twice is a `ModelError` that says what to do."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if lacks_memory(error):
            raise
        what = f"gradient='exact' cannot differentiate this model twice ({first_line(error)}); use 'secant'"
        raise ModelError(what) from error


class _Evaluator(nn.Module):
    """A loss as a module with the model inside, so that `functional_call` can replace the model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Callable[[Any, Any], Tensor], batch: Any) -> Tensor:
        return loss(self.model, batch)


def _check_twice(gradient: Sequence[Tensor | None]) -> None:
    """Refuse a graph with a dead end: asked for given leaves only, autograd would pass it over in silence."""
    for node in nodes(*(each for each in gradient if each is not None)):
        if node.name() in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
            raise RuntimeError("an operation in it has no second derivative")


def _check_once(loss: Tensor) -> None:
    """Refuse a forward through functions marked `once_differentiable`."""
    for node in nodes(loss):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE:
            raise RuntimeError(f"{node._forward_cls.__name__} is marked once_differentiable")
