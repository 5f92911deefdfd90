"""LUR as a trainer of open-unlearning (github.com/locuslab/open-unlearning): its own extension point, nothing patched.

    # src/trainer/__init__.py of open-unlearning, beside the others that are registered there
    from fastlur.integrations.open_unlearning import lur_trainer
    _register_trainer(lur_trainer())

`docs/open-unlearning.md` has the config that goes with it. open-unlearning's trainers are subclasses of the Trainer of
transformers whose batches are {"forget": …, "retain": …}, each with "input_ids", "attention_mask" and "labels"; neither
framework is imported before `lur_trainer` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastlur import meta, ops
from fastlur.errors import ArgumentError, DataError, NonFiniteError
from fastlur.integrations.trainer import check_loss, moving, named_as_now, refuse_many
from fastlur.leaves import Reached
from fastlur.llm.forgetting import SimNPO
from fastlur.llm.likelihood import causal_cross_entropy
from fastlur.losses import BoundedForgetting
from fastlur.methods.lur import LUR, RELATIVE_DEFAULT, Order
from fastlur.task import CAUSAL, viewed_as
from fastlur.update import warn_of_rounding
from fastlur.world import borrowed_random, derive, seed_torch

Vector = list[Tensor]
BOUNDED = BoundedForgetting(per_target=True)
ARGUMENTS = ("input_ids", "attention_mask", "labels")
_Trainer: Any = object


def bounded_ascent(model: Any, batch: Any) -> Tensor:
    """−mean min(cross-entropy, log(words)) over the tokens of the answers: ascent that ends once all are guessed."""
    with viewed_as(CAUSAL):
        return BOUNDED(model, batch)


def gradient_ascent(model: Any, batch: Any) -> Tensor:
    """−(mean cross-entropy of the answers), as in open-unlearning's GradDiff: unbounded below."""
    return -causal_cross_entropy(model, batch)


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "bounded": bounded_ascent,
    "grad_ascent": gradient_ascent,
    "simnpo": SimNPO(),
}


class LURTraining(_Trainer):  # type: ignore[misc]
    """What LUR adds to a Trainer: `training_step` puts the meta-gradient into `.grad`.

    Source: Patel & Qiu, arXiv 2503.06339 (reconstructed; see `fastlur.LUR`).

    All else is the Trainer's: the optimizer, its schedule, clipping, gradient accumulation, gradient checkpointing,
    bf16 autocast, saving. So some of what `fastlur.MetaStep` promises cannot hold here:

    - The update is the optimizer's own and not fused with the direction. A direction that is not finite ends the run
      before the optimizer sees it; that an update overflows is stopped by nobody.
    - With gradient accumulation every micro-batch makes a direction of its own, and their mean is what the optimizer
      gets. That is the direction of the whole batch up to O(α), not to rounding.
    - "optimistic" keeps the last micro-batch's gradient, which no checkpoint of the Trainer's holds: the first step
      after a resume is one of "secant".
    - One process on one device: no DDP, DataParallel, FSDP or DeepSpeed, and no fp16 loss scaling; all are refused.

    Args:
        *args: the Trainer's.
        forget_loss: "bounded" (see `bounded_ascent`), "grad_ascent", "simnpo", or a function (model, batch) -> scalar;
            those of `fastlur.llm` that compare with a reference must be given it (`reference_log_probs`).
        forget_weight: λ ≥ 0.
        inner_lr: α ≥ 0; None: 0.1, relative.
        relative_inner_lr: the inner step has length `inner_lr` whatever the gradient's norm.
        gradient: "optimistic", "secant" or "first_order".
        order: "retain_first" or "forget_first".
        **kwargs: the Trainer's.

    Raises:
        ArgumentError: a value out of range, an unknown name, "exact", or a way to run that is refused.
        ModelError: nothing may move, or, at the first step, no loss reaches the adapters or anything else that may.
        NonFiniteError: a loss or gradient is not finite; `.grad` is as it was before that batch.
    """

    def __init__(
        self,
        *args: Any,
        forget_loss: str | Callable[[Any, Any], Tensor] = "bounded",
        forget_weight: float = 1.0,
        inner_lr: float | None = None,
        relative_inner_lr: bool = False,
        gradient: meta.Gradient = "optimistic",
        order: Order = "retain_first",
        **kwargs: Any,
    ) -> None:
        self.lur = LUR(inner_lr, forget_weight, gradient, order, relative_inner_lr)
        if gradient == "exact":
            raise ArgumentError(
                "gradient='exact' differentiates twice, which fused attention and checkpointing forbid; use 'secant'"
            )
        check_loss(forget_loss, LOSSES)
        super().__init__(*args, **named_as_now(type(self), kwargs))
        if not hasattr(self, "tokenizer"):  # open-unlearning's evaluation asks for it by the old name
            self.tokenizer = getattr(self, "processing_class", None)
        refuse_many(self.args, self.accelerator)
        self.reach, self.unreached = Reached(self.model, moving(self.model)), True
        warn_of_rounding(each.dtype for _, each in moving(self.model))
        self.forget_loss = LOSSES[forget_loss] if isinstance(forget_loss, str) else forget_loss
        self.previous: Vector | None = None
        self._at = -1, 0  # the step, and the micro-batch in it

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Add the direction of this batch to `.grad`; returns L_r + λ L_f, as they were seen, for the Trainer's log."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have modes
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        batches = {side: _batch(inputs, side) for side in ("forget", "retain")}
        parts = getattr(self, "current_gradient_accumulation_steps", None) or self.args.gradient_accumulation_steps
        arena = _Live(self, model, batches)
        with torch.no_grad():
            inner, outer = meta.direction(arena, self.lur.gradient, self.previous)
            arena.check(inner, outer)
            self.previous = inner if self.lur.gradient == "optimistic" else None
            arena.give(inner, outer, 1 / parts)
        seen: Tensor = arena.value() / parts
        return seen

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """λ L_f + L_r where nothing is displaced; of an ordinary batch the Trainer's own loss."""
        if "forget" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        forget = self.forget_loss(model, _batch(inputs, "forget"))
        return self.lur.forget_weight * forget + causal_cross_entropy(model, _batch(inputs, "retain"))

    def micro_batch(self) -> tuple[int, int]:
        """The number of the step, and of the micro-batch in it: what the random draws of a pass depend on."""
        step = int(self.state.global_step)
        self._at = step, self._at[1] + 1 if self._at[0] == step else 0
        return self._at


class _Live:
    """The arena of a rule over the parameters of a model as they lie: a point is seen by lending its storage.

    Gradients are taken by `backward`, since reentrant checkpointing knows no other way; what has been accumulated in
    `.grad` is set aside meanwhile.
    """

    def __init__(self, trainer: Any, model: Any, batches: dict[str, Any]) -> None:
        self.trainer, self.model, self.batches, lur = trainer, model, batches, trainer.lur
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.relative = lur.relative_inner_lr or lur.inner_lr is None
        self.first, self.second = ("retain", "forget") if lur.order == "retain_first" else ("forget", "retain")
        device = self.parameters[0].device
        inner_lr = RELATIVE_DEFAULT if lur.inner_lr is None else lur.inner_lr
        self.inner_lr = torch.tensor(inner_lr, dtype=torch.float64, device=device)
        self.device, self.values, self.place = device, dict[str, Tensor](), trainer.micro_batch()
        self.reached = [False] * len(self.parameters)

    def inner(self, at: Vector | None) -> Vector:
        return self._gradient(self.first, at)

    def outer(self, at: Vector) -> Vector:
        return self._gradient(self.second, at)

    def linearized(self) -> Any:
        raise NotImplementedError  # refused before

    def norm2(self, along: Vector) -> Tensor | None:
        return ops.grad_dot(along, along)[0][0] if self.relative else None

    def displaced(self, along: Vector, norm2: Tensor | None) -> Vector:
        theta = [parameter.detach() for parameter in self.parameters]
        out = [torch.empty_like(each) for each in theta]
        ops.displace(out, theta, along, self.inner_lr, norm2)
        return out

    def give(self, inner: Vector, outer: Vector, factor: float) -> None:
        """Add the sum to `.grad` of what a loss has reached; other parameters keep None, and so do not move."""
        for parameter, one, other, reached in zip(self.parameters, inner, outer, self.reached, strict=True):
            if reached:
                direction = (one + other).mul_(factor)
                parameter.grad = direction if parameter.grad is None else parameter.grad.add_(direction)

    def check(self, inner: Vector, outer: Vector) -> None:
        """Refuse a direction that is not finite, and a first one in which nothing, or no adapter, would move."""
        if self.trainer.unreached:
            for parameter, reached in zip(self.parameters, self.reached, strict=True):
                if reached:
                    self.trainer.reach.arrived(parameter)
            self.trainer.reach.check()
            self.trainer.unreached = False
        seen = [ops.grad_dot(inner, outer)[0], self.value()[None].double()]
        if not bool(torch.isfinite(torch.cat(seen)).all()):
            step = self.place[0] + 1
            raise NonFiniteError(
                f"step {step}: a loss or a gradient is not finite, loss {float(self.value())}; lower learning_rate or "
                "inner_lr, or look for such values in the data; no gradient of this batch has reached the optimizer",
                step,
            )

    def value(self) -> Tensor:
        """L_r + λ L_f as the passes saw them, shape ()."""
        weight: float = self.trainer.lur.forget_weight
        return self.values["retain"] + weight * self.values["forget"]

    def _gradient(self, side: str, at: Vector | None) -> Vector:
        trainer, weight = self.trainer, self.trainer.lur.forget_weight if side == "forget" else 1.0
        loss = trainer.forget_loss if side == "forget" else causal_cross_entropy
        with _aside(self.parameters), _lent(self.parameters, at), borrowed_random(self.device), torch.enable_grad():
            # both passes of a loss see the same dropout
            seed_torch(derive(trainer.args.seed, *self.place, side), self.device)
            with trainer.compute_loss_context_manager():
                value = loss(self.model, self.batches[side])
            self.values.setdefault(side, value.detach())
            if not value.requires_grad:
                trainer.reach.check()
            torch.autograd.backward(value * weight)
            found = [parameter.grad for parameter in self.parameters]
        self.reached = [known or each is not None for known, each in zip(self.reached, found, strict=True)]
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]


@contextmanager
def _aside(parameters: Vector) -> Iterator[None]:
    """Inside, no gradient is there; afterwards those from before are."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


@contextmanager
def _lent(parameters: Vector, at: Vector | None) -> Iterator[None]:
    """Inside, the parameters have the values of another point; a graph must begin and end inside.

    Casts that an autocast around all of this has kept would be of the old values: they are dropped.
    """
    own = [parameter.data for parameter in parameters]
    torch.clear_autocast_cache()
    try:
        for parameter, value in zip(parameters, own if at is None else at, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value
        torch.clear_autocast_cache()


def _batch(inputs: Any, side: str) -> dict[str, Tensor]:
    part = inputs.get(side) if hasattr(inputs, "get") else None
    if part is None or any(name not in part for name in ARGUMENTS):
        raise DataError(
            f"{side}: a batch must hold {side!r} with {', '.join(map(repr, ARGUMENTS))}; use a data set with both "
            "sides, and set remove_unused_columns=False"
        )
    return {name: part[name] for name in ARGUMENTS}


@cache
def lur_trainer(base: Any = None) -> Any:
    """The trainer class "LUR", to be registered; see `LURTraining` for its arguments.

    Args:
        base: the Trainer to build on; None: open-unlearning's UnlearnTrainer, whose `src` must be importable.

    Raises:
        ArgumentError: it is None, and open-unlearning is not to be found.
    """
    if base is None:
        try:
            base = import_module("trainer.unlearn.base").UnlearnTrainer
        except ImportError as error:
            raise ArgumentError(
                f"base=None: open-unlearning's trainer.unlearn.base cannot be imported ({error}); call this from its "
                "src folder, or pass its UnlearnTrainer"
            ) from error
    return type("LUR", (LURTraining, base), {"__doc__": LURTraining.__doc__})
