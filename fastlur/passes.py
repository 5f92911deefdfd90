"""Passes: one forward and backward of the forget or the retain loss, at θ or at another point of the space.

Everything a pass must respect stands here, so that a method is only mathematics: which batch, which dropout mask, which
pass moves the normalisation statistics, which precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastlur.curvature import By, Curvature, Pull, put
from fastlur.data import Feed
from fastlur.errors import ArgumentError, ModelError, nearest, unknown
from fastlur.microbatch import Spare
from fastlur.space import ParameterSpace, Vector
from fastlur.statistics import Statistics
from fastlur.value import in_memory, scalar
from fastlur.virtual_norm import Recomputed, VirtualNorm, reference_of
from fastlur.world import derive, generators, passing, seed_torch

Loss = Callable[[Any, Any], Tensor]
Which = Literal["forget", "retain"]
Call = Callable[[Loss, Any], Any]  # (loss, batch) ↦ its value
NormalizeBy = Literal["own", "retain"]
ARGUMENT: dict[Which, str] = {"forget": "forget_loss", "retain": "loss"}


class Passes:
    """The two losses of a step as gradients over a space.

    Attributes:
        step: number of the step that is being made, from 1; 0 before the first.
        steps: how many are planned; None where nobody said.
        values: the losses of this step so far, unweighted, by side.
        replaced: batches that the step took instead of the given ones, by side.
        drew: whether a pass has moved a random generator since this was set to False; None: nobody asks.
        spare: how many items at a time the model takes, and what is run again with fewer where memory runs out.

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
        rows: items that the model takes at a time; None: whole batches, until memory runs out.
        normalize_by: whose statistics batch norm takes in forget passes: their "own", or those of some of the step's
            "retain" items (`fastlur.virtual_norm`), for another forward and backward over these.
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
        rows: int | None = None,
        normalize_by: NormalizeBy = "own",
    ) -> None:
        if unknown(normalize_by, known := get_args(NormalizeBy)):
            raise ArgumentError(f"normalize_by={normalize_by!r} is unknown; {nearest(normalize_by, known)}")
        self.space = space
        self.losses = losses
        self.weights = weights
        self.precision = precision
        self.seed = seed
        self.training = training
        self.steps, self.step = steps, 0
        self.statistics = Statistics(space.model)
        self.values: dict[Which, Tensor] = {}
        self._feed = feed
        self.spare = Spare(space.model, space.model if forward is None else forward, rows)
        self._norms = VirtualNorm(space.model) if normalize_by == "retain" and training else None
        self._batches: dict[Which, Any] = {}
        self.replaced: dict[Which, Any] = {}
        self.drew: bool | None = None
        self._tracked = False

    @property
    def forward(self) -> Callable[..., Any]:
        """What losses are called with as the model; asked for anew by whoever is run again."""
        return self.spare.forward

    @property
    def feed(self) -> Feed:
        """The data; an `ArgumentError` where nobody gave any, as in a loop of the user's own."""
        if self._feed is None:
            raise ArgumentError("method: looks at the data beforehand; use it through fastlur.unlearn")
        return self._feed

    @property
    def has_feed(self) -> bool:
        """Whether there is one."""
        return self._feed is not None

    def batch(self, which: Which) -> Any:
        """The batch of this side."""
        return self._batches[which]

    def replace(self, which: Which, batch: Any, draw: object, number: int) -> None:
        """Take another batch of this side for the rest of the step, before its first pass.

        Args:
            which: the side.
            batch: what is taken.
            draw: of `feed.epoch`, where it comes from.
            number: its number there.
        """
        self._batches[which] = self.replaced[which] = batch
        self.feed.instead(which, self.step, draw, number)

    @contextmanager
    def of_step(self, step: int, forget: Any, retain: Any) -> Iterator[None]:
        """Inside, passes are those of this step on these batches; `values` collects the losses, unweighted."""
        self.step, self._batches = step, {"forget": forget, "retain": retain}
        self.values, self.replaced, self._tracked = {}, {}, False
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
        space, leaves = self.space, self.space.leaves()
        kept = [(leaf, None if leaf.grad is None else leaf.grad.clone()) for leaf in also]

        def attempt() -> None:
            value = self._evaluate(which, self._called(which), loss)
            self.values.setdefault(which, value.detach())
            torch.autograd.backward(value * weight, inputs=[*leaves, *also])

        def undo() -> None:
            nonlocal leaves
            for leaf, gradient in kept:
                leaf.grad = gradient
            if add:  # what has arrived has arrived as a whole, each leaf's sum at once; the others are still to come
                done = space.reached
                if any(len(space.slots[index].parameters) > 1 for index in done):
                    raise ModelError("model: memory ran out among tied parameters; lower batch_size")
                leaves = [p for index, slot in enumerate(space.slots) if index not in done for p in slot.parameters]
            else:
                out.zero_()
                space.reached = set()

        with space.at(at), space.collect(out, add), self._moving_statistics(which)():
            before, space.reached = space.reached, set()
            try:
                self.spare.run(attempt, self._batches[which], undo)
            finally:
                space.reached |= before

    def joint(self, out: Vector) -> None:
        """out ← ∇ of both losses at θ, each times its weight, by one backward: what two adding passes give as well.

        The activations of both batches are alive at once.
        """
        sides: tuple[Which, Which] = ("retain", "forget")
        moving = self._moving_statistics("retain"), self._moving_statistics("forget")

        def attempt() -> None:
            parts = []
            with ExitStack() as stack:  # buffers are put back after the backward, which may hold them
                for which, statistics in zip(sides, moving, strict=True):
                    stack.enter_context(statistics())
                    value = self._evaluate(which, self._called(which))
                    self.values.setdefault(which, value.detach())
                    parts.append(value * self.weights[which])
                torch.autograd.backward(parts[0] + parts[1], inputs=self.space.leaves())

        with self.space.collect(out):
            self.spare.run(attempt, self._batches["retain"], lambda: out.zero_())

    def value(self, which: Which, at: Vector | None = None, *, loss: Loss | None = None) -> Tensor:
        """The loss at the point, shape (), without a gradient: one forward, which moves no statistics."""
        with torch.no_grad(), self.space.at(at), self.statistics.frozen():
            return self.spare.run(lambda: self._evaluate(which, self._called(which), loss), self._batches[which])

    def linearize(self, which: Which, out: Vector, *, keep_graph: bool = True, by: By = "autograd") -> Pull:
        """out ← weight · ∇loss at θ; returns H, where H(v, hv) sets hv ← weight · (Hessian of the loss at θ) v.

        The product may be taken once.

        Args:
            which: the side whose batch is taken.
            out: written.
            keep_graph: the product shares its forward and the gradient with this call, whose graph is held until then.
                False: a plain pass now and a fresh one in the product, which needs less memory in between.
            by: "autograd", or "func" for torch.func.

        Raises:
            ModelError: here or by the product: the model cannot be differentiated twice, or memory runs out.
        """
        fresh = partial(Curvature, self.space, lambda call: self._evaluate(which, call), self.weights[which], by)
        if not keep_graph:
            before = {name: buffer.clone() for name, buffer in self.space.model.named_buffers()}
            self.gradient(which, out)

            def product(v: Vector, hv: Vector) -> None:
                with in_memory():
                    fresh(buffers=before).product(v, hv)

            return product
        with in_memory():
            curvature = fresh()
        self.values.setdefault(which, curvature.loss)
        if self._first_retain(which):
            self.statistics.take(curvature.buffers)
        with torch.no_grad():
            put(curvature.gradient, out)
        self.space.reached |= {i for i, each in enumerate(curvature.gradient) if each is not None}
        return in_memory()(curvature.product)

    @property
    def borrows(self) -> bool:
        """Whether forget passes of steps are normalised by retain items."""
        return bool(self._norms)

    def borrow_no_more(self) -> None:
        """From now on forget passes are normalised by themselves."""
        self._norms = None

    def _lending(self, which: Which) -> VirtualNorm | None:
        """What lends a pass its statistics; None in eval mode, and where there are no retain items."""
        asked = which == "forget" and self.space.model.training and "retain" in self._batches
        return self._norms if asked and self.borrows else None

    def _called(self, which: Which) -> Call:
        """How a loss is called; no compiled form where layers are lent statistics: it would not notice."""
        return lambda loss, batch: loss(self.spare.plain if self._lending(which) else self.forward, batch)

    def _evaluate(self, which: Which, call: Call, loss: Loss | None = None) -> Tensor:
        loss = self.losses[which] if loss is None else loss
        norms = self._lending(which)
        if norms is None:
            return self._seeded(which, lambda: call(loss, self._batches[which]))
        whole, run = self._batches["retain"], partial(call, self.losses["retain"])
        references = [partial(self._seeded, "retain", partial(run, each)) for each in (reference_of(whole), whole)]
        try:
            with norms.by(*references):
                return self._seeded(which, lambda: call(loss, self._batches[which]))
        except Recomputed as error:
            error.warn()
            self.borrow_no_more()
            return self._evaluate(which, call, loss)

    def _seeded(self, which: Which, evaluate: Callable[[], Any]) -> Tensor:  # every pass: the same dropout mask
        seed_torch(derive(self.seed, self.step, which), self.space.device)
        before = None if self.drew is None else generators(self.space.device)
        value = scalar(evaluate(), ARGUMENT[which])
        if before is not None:
            self.drew = self.drew or before != generators(self.space.device)
        return value

    def _moving_statistics(self, which: Which) -> Callable[[], AbstractContextManager[None]]:
        """What a pass runs in, decided once however often it is run."""
        return nullcontext if self._first_retain(which) else self.statistics.frozen

    def _first_retain(self, which: Which) -> bool:
        """Whether this pass is the one of the step that moves the statistics, and note that it was."""
        first = which == "retain" and not self._tracked
        self._tracked |= first
        return first
