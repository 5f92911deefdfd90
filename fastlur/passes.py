"""Passes: one forward and backward of the forget or the retain loss, at θ or at another point of the space.

Everything a pass must respect stands here, so that a method is only mathematics: which batch, which dropout mask, which
pass moves the normalisation statistics, which precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlur.data import Feed
from fastlur.errors import ArgumentError, DataError, ModelError, not_scalar
from fastlur.space import ParameterSpace, Vector
from fastlur.statistics import Statistics
from fastlur.world import derive, passing, seed_torch

Loss = Callable[[Any, Any], Tensor]
Which = Literal["forget", "retain"]
ARGUMENT: dict[Which, str] = {"forget": "forget_loss", "retain": "loss"}


class Passes:
    """The two losses of a step as gradients over a space.

    Attributes:
        step: number of the step that is being made, from 1; 0 before the first.
        steps: how many are planned; None where nobody said.
        values: the losses of this step so far, unweighted, by side.
        forward: what losses are called with as the model.

    Args:
        space: the moving parameters.
        losses: "forget" and "retain", each `(model, batch) -> scalar` to minimise.
        weights: the factor on each loss; gradients carry it, reported losses do not.
        precision: "fp32", or "bf16" for autocast.
        seed: with the step's number it determines the random draws of each pass (dropout).
        forward: what the losses call as the model; default the module itself (a compiled form may stand in).
        training: False: the passes of steps run in eval mode, for methods that keep the model's statistics.
        feed: the data, for methods that look at more than a step's batches; None in a loop of the user's own.
        steps: how many steps are planned.
    """

    def __init__(
        self,
        space: ParameterSpace,
        losses: dict[Which, Loss],
        weights: dict[Which, float],
        *,
        precision: str = "fp32",
        seed: int = 0,
        forward: Callable[..., Any] | None = None,
        training: bool = True,
        feed: Feed | None = None,
        steps: int | None = None,
    ) -> None:
        self.space = space
        self.losses = losses
        self.weights = weights
        self.precision = precision
        self.seed = seed
        self.training = training
        self.steps = steps
        self.step = 0
        self.statistics = Statistics(space.model)
        self.values: dict[Which, Tensor] = {}
        self._feed = feed
        self.forward = space.model if forward is None else forward
        self._batches: dict[Which, Any] = {}
        self._tracked = False
        self._evaluator = _Evaluator(space.model)
        self._graph_reach: dict[Which, set[int]] = {}

    @property
    def feed(self) -> Feed:
        """The data.

        Raises:
            ArgumentError: nobody gave any, as in a loop of the user's own.
        """
        if self._feed is None:
            raise ArgumentError("method: looks at the data beforehand; use it through fastlur.unlearn")
        return self._feed

    def batch(self, which: Which) -> Any:
        """The batch of this side."""
        return self._batches[which]

    @contextmanager
    def of_step(self, step: int, forget: Any, retain: Any) -> Iterator[None]:
        """Inside, passes are those of this step on these batches; `values` collects the losses, unweighted."""
        self.step, self._batches = step, {"forget": forget, "retain": retain}
        self.values = {}
        self._tracked = False
        self.space.reached.clear()
        try:
            with passing(self.space.model, self.space.device, self.precision, self.training):
                yield
        finally:
            self._batches = {}

    @contextmanager
    def aside(self, batches: dict[Which, Any] | None = None, training: bool = False) -> Iterator[None]:
        """Inside, passes are on these batches and leave no trace: no statistics move, no loss is reported.

        For what a method does before, between or after steps; it may stand inside `of_step`. In eval mode unless told
        otherwise, so that a batch of one item and one class is judged as the finished model would.
        """
        before = self._batches, self.values, self._tracked, set(self.space.reached)
        self._batches, self.values, self._tracked = batches or {}, {}, True
        try:
            with passing(self.space.model, self.space.device, self.precision, training):
                yield
        finally:
            self._batches, self.values, self._tracked, self.space.reached = before

    def gradient(
        self,
        which: Which,
        out: Vector,
        at: Vector | None = None,
        *,
        loss: Loss | None = None,
        weight: float | Tensor | None = None,
        add: bool = False,
        also: Sequence[Tensor] = (),
    ) -> None:
        """out ← weight · ∇loss at the point, by one forward and one backward.

        Args:
            which: the side whose batch is taken.
            out: written; with `add` added to.
            at: where; None: θ.
            loss: another loss than the side's own.
            weight: another factor than the side's own; a tensor may stay on the device.
            add: add to `out` instead of overwriting it.
            also: leaves outside the space that the loss depends on; their `.grad` is added to.

        Raises:
            DataError: the loss is not a scalar that depends on a moving parameter.
        """
        weight = self.weights[which] if weight is None else weight
        with self.space.at(at), self.space.collect(out, add), self._moving_statistics(which):
            value = self._evaluate(which, lambda own, batch: (loss or own)(self.forward, batch))
            self.values.setdefault(which, value.detach())
            torch.autograd.backward(value * weight, inputs=[*self.space.leaves(), *also])

    def value(self, which: Which, at: Vector | None = None, *, loss: Loss | None = None) -> Tensor:
        """The loss at the point, shape (), without a gradient: one forward, which moves no statistics."""
        with torch.no_grad(), self.space.at(at), self.statistics.frozen():
            return self._evaluate(which, lambda own, batch: (loss or own)(self.forward, batch))

    def linearize(self, which: Which, out: Vector) -> Callable[[Vector, Vector], None]:
        """out ← weight · ∇loss at θ; returns H, where H(v, hv) sets hv ← weight · (Hessian of the loss at θ) v.

        torch.func's `vjp` of `grad`: the gradient is the primal of the Hessian-vector product and is not computed
        again. The product may be taken once; it holds the graph until then. Attention runs by its plain algorithm
        here, since the fused ones cannot be differentiated twice.
        """
        space, names = self.space, self.space.names
        buffers = {f"model.{name}": buffer for name, buffer in space.model.named_buffers()}

        def value(parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            # statistics move in copies made in here: a transform must not write to tensors from outside it
            moved = {name: buffer.clone() for name, buffer in buffers.items()}
            everywhere = {f"model.{name}": parameters[slot.names[0]] for slot in space.slots for name in slot.names}
            state = everywhere | moved
            loss = self._evaluate(
                which, lambda loss, batch: torch.func.functional_call(self._evaluator, state, (loss, batch))
            )
            return loss * self.weights[which], (loss.detach(), {name: state[name] for name in moved})

        with sdpa_kernel(SDPBackend.MATH):
            here = dict(zip(names, space.theta.views, strict=True))
            try:
                found: Any = torch.func.vjp(torch.func.grad(value, has_aux=True), here, has_aux=True)
            except (RuntimeError, NotImplementedError) as error:
                said = str(error).splitlines()[0]
                what = f"gradient='exact' cannot differentiate this model twice ({said}); use 'secant'"
                raise ModelError(what) from error
            gradient, pull, (loss, moved) = found
        self.values.setdefault(which, loss.detach())
        with torch.no_grad():
            if self._first_retain(which):
                self.statistics.take({name.removeprefix("model."): buffer for name, buffer in moved.items()})
            torch._foreach_copy_(out.views, [gradient[name].detach() for name in names])
        space.reached |= self._reach(which)

        def curvature(v: Vector, hv: Vector) -> None:
            (product,) = pull(dict(zip(names, v.views, strict=True)))
            with torch.no_grad():
                torch._foreach_copy_(hv.views, [product[name].detach() for name in names])

        return curvature

    def _evaluate(self, which: Which, call: Callable[[Loss, Any], Any]) -> Tensor:
        # the same numbers for every pass of this loss in this step: the same dropout mask
        seed_torch(derive(self.seed, self.step, which), self.space.device)
        return scalar(call(self.losses[which], self._batches[which]), which)

    @contextmanager
    def _moving_statistics(self, which: Which) -> Iterator[None]:
        with nullcontext() if self._first_retain(which) else self.statistics.frozen():
            yield

    def _first_retain(self, which: Which) -> bool:
        """Whether this pass is the one of the step that moves the statistics, and note that it was."""
        first = which == "retain" and not self._tracked
        self._tracked |= first
        return first

    def _reach(self, which: Which) -> set[int]:
        """The slots that the loss depends on, read once off the graph of a forward: transforms do not tell."""
        if which not in self._graph_reach:
            with self.statistics.frozen():
                loss = self._evaluate(which, lambda loss, batch: loss(self.space.model, batch))
            index = {id(p): i for i, slot in enumerate(self.space.slots) for p in slot.parameters}
            self._graph_reach[which] = {index[id(p)] for p in _leaves(loss) if id(p) in index}
        return self._graph_reach[which]


def scalar(value: Any, which: Which) -> Tensor:
    """The value, if it is a loss that can be minimised.

    Raises:
        DataError: it is not a scalar tensor, or depends on no moving parameter.
    """
    name = ARGUMENT[which]
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError(not_scalar(name, value))
    if torch.is_grad_enabled() and not value.requires_grad:
        raise DataError(f"{name}: depends on no parameter that may move; check `parameters`, and detach() in the loss")
    return value.reshape(())


class _Evaluator(nn.Module):
    """A loss as a module with the model inside, so that `functional_call` can replace the model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Loss, batch: Any) -> Tensor:
        return loss(self.model, batch)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaf tensors of the graph behind a loss."""
    seen: set[object] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)
