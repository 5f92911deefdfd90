"""One whole step: passes, direction, decision, update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlur import checks
from fastlur.capture import Captured, check_capture
from fastlur.culprit import accuse, overflowed
from fastlur.data import Feed, to_device
from fastlur.errors import ArgumentError, NonFiniteError
from fastlur.fitting import check_state, check_vectors, load_optimizer
from fastlur.interrupt import Whole
from fastlur.methods.base import Direction, Method, Recipe, State, checked_direction, checked_mask
from fastlur.passes import ARGUMENT, Loss, Passes, Which
from fastlur.reference import COUNT, OK
from fastlur.slots import Selection
from fastlur.snapshot import undone
from fastlur.space import ParameterSpace, Vector
from fastlur.stats import FIELDS, StepStats
from fastlur.targets import prepared
from fastlur.update import Update, check_optimizer, warn_of_rounding
from fastlur.world import borrowed_random, derive, seed_torch

READ_EVERY = 32  # steps between two looks of the host at the flag, where looking means waiting for a device


class Step:
    """A method, an update and a model, stepping together; open from construction until `close`."""

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        method: Method,
        losses: dict[Which, Loss],
        *,
        optimizer: str | torch.optim.Optimizer = "sgd",
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        parameters: Selection = None,
        precision: str = "fp32",
        memory_format: torch.memory_format | None = None,
        compile: bool = False,
        seed: int = 0,
        feed: Feed | None = None,
        steps: int | None = None,
        capture: bool = False,
        rows: int | None = None,
        target: Callable[[Passes], Loss] | None = None,
    ) -> None:
        checks.module(model)
        checks.numbers(lr, momentum, weight_decay, max_grad_norm, precision)
        checks.memory_format(memory_format)
        checks.losses(**{ARGUMENT[side]: loss for side, loss in losses.items()})
        checks.flags(compile, capture, names=("compile", "capture"))
        check_optimizer(optimizer)
        self.space = ParameterSpace(model, parameters, memory_format)
        try:
            if capture:
                check_capture(self.space.device, optimizer)
            self.method, self.given = method, losses
            self.memory_format = memory_format
            weights: dict[Which, float] = {"forget": method.forget_weight, "retain": 1.0}
            forward: Callable[..., Any] = torch.compile(model) if compile else model
            self.passes = Passes(
                self.space,
                losses,
                weights,
                precision=precision,
                seed=seed,
                forward=forward,
                training=getattr(method, "training", True),
                feed=feed,
                steps=steps,
                rows=rows,
                normalize_by=getattr(method, "normalize_by", "own"),
            )
            self.update = Update(self.space, optimizer, lr, momentum, weight_decay, max_grad_norm)
            if steps != 0:
                warn_of_rounding(flat.dtype for flat in self.space.theta.flats)
            with borrowed_random(self.space.device):
                drawn: dict[Which, str] = {"retain": "kept", "forget": "target"}  # a novice learns by the retain loss
                for side, draw in drawn.items():
                    seed_torch(derive(seed, draw), self.space.device)
                    again = side == "forget" and target is not None
                    made = target(self.passes) if again else prepared(losses[side], self.passes)  # type: ignore[misc]
                    self.passes.losses = self.passes.losses | {side: made}
                seed_torch(derive(seed, "prepare"), self.space.device)
                trim, mask = getattr(method, "trim", None), getattr(method, "mask", None)
                if trim is not None:
                    trim(self.passes)
                self.mask: Vector | None = None if mask is None else checked_mask(mask(self.passes))
                self.state = method.prepare(self.passes)
            if not isinstance(self.state, State):
                kind = type(self.state).__name__
                raise ArgumentError(f"method: prepare of {type(method).__name__} must return a State, not a {kind}")
            if not self.weights_are_finite():
                raise NonFiniteError(
                    f"weights are not finite before the first step: as given, or by prepare of {type(method).__name__}"
                )
        except BaseException:
            self.space.close()
            raise
        self.step = 0
        self._unread: list[StepStats] = []
        self._captured: Captured | None = None
        if capture:
            self._captured = Captured(self._work, self.passes)
            self.space.piecewise = False  # a graph wants gradients to stay where they are
        self._direction: Direction | None = None
        self._last: tuple[Direction | None, dict[Which, Any] | None] = None, None  # while the host looks, no longer
        self._nothing = torch.full((), math.nan, device=self.space.device)  # the loss of a side without a pass

    @torch.inference_mode(False)
    def __call__(self, forget: Any, retain: Any) -> StepStats:
        """One step, update included.

        Raises:
            NonFiniteError: a loss or gradient of this or one of the last 32 steps was not finite; the model is as it
                was after the last good step.
        """
        self.space.check()
        device = self.space.device
        forget, retain = (to_device(batch, device, self.memory_format) for batch in (forget, retain))
        self.update.look()
        with borrowed_random(device):
            work = self._work if self._captured is None else self._captured
            forget_loss, retain_loss, dots = work(forget, retain)
        self.step += 1
        stats = StepStats(self.step, forget_loss, retain_loss, dots)
        self._unread.append(stats)
        if device.type == "cpu" or len(self._unread) >= READ_EVERY:
            batches: dict[Which, Any] = {"forget": forget, "retain": retain}
            self._last = self._direction, batches | self.passes.replaced
            self.check()
            self._last = None, None
        self.passes.replaced = {}
        return stats

    def _work(self, forget: Any, retain: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What a step does on the device: both losses, not a number for a side without a pass, and the dots."""
        passes, updated = self.passes, False
        passes.statistics.save()
        try:
            with passes.of_step(self.step + 1, forget, retain):
                direction = checked_direction(self.method.direction(passes, self.state), self.method)
                if self.mask is not None:
                    direction = direction._replace(mask=_both(self.mask, direction.mask))
                with torch.no_grad(), Whole():  # weights, moments and statistics are of one step
                    dots = self.update.decide(direction, list(passes.values.values()))
                    self.update.apply(direction)
                    passes.statistics.keep(self.update.control[OK])
                    updated = True
        except BaseException:
            self.space.home()
            if not updated:
                passes.statistics.keep(torch.zeros((), device=self.space.device))
            raise
        self._direction = direction
        forget_loss, retain_loss = (passes.values.get(side, self._nothing) for side in ("forget", "retain"))
        return forget_loss, retain_loss, dots

    @torch.inference_mode(False)
    def check(self) -> None:
        """Look at the flag now.

        Raises:
            NonFiniteError: it is down.
        """
        unread, self._unread = self._unread, []
        if bool(self.update.control[OK]):
            return
        if bool(self.update.overflow):
            number = int(self.update.control[COUNT])
            raise overflowed(self.space, number, self._last[0] if number == self.step else None)
        bad = next((stats for stats in unread if not self._was_good(stats)), None)
        if bad is None:
            raise NonFiniteError("a loss or gradient was not finite in an earlier step; the model is as before it")
        direction, batches = self._last if bad.step == self.step else (None, None)
        raise accuse(self.passes, bad, self._nothing, direction, batches)

    def _was_good(self, stats: StepStats) -> bool:
        """Whether every number of a step is finite; that a side was not evaluated is no fault."""
        numbers = zip(FIELDS, stats.numbers().tolist(), strict=True)
        return all(math.isfinite(value) or getattr(stats, name) is self._nothing for name, value in numbers)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the model itself: moments and kept gradients by parameter name.

        Raises:
            ModelError: the step is closed.
        """
        self.space.check()
        vectors = self._fixed() | {f"method.{k}": v for k, v in self.state.vectors().items()}
        named = {k: {n: t.clone() for n, t in zip(self.space.names, v.views, strict=True)} for k, v in vectors.items()}
        custom = None if self.update.custom is None else self.update.custom.state_dict()
        passes = self.passes
        plain = {"step": self.step, "method": self.method.settings(), "rows": passes.spare.rows, "lent": passes.borrows}
        tensors = {name: tensor.clone() for name, tensor in self.state.tensors().items()}
        return plain | {
            "control": self.update.control.clone(),
            "vectors": named,
            "tensors": tensors,
            "optimizer": custom,
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's own state is the caller's to load.

        Raises:
            CheckpointError: it was taken from another optimizer, method or set of parameters; nothing was changed.
            ModelError: the step is closed.
        """
        self.space.check()
        own, custom = self.state.tensors(), self.update.custom
        check_state(state, self.method.settings(), self.update.control, own, custom is not None)
        saved = state["vectors"]
        prefix = "method."
        theirs = self.state.resume([name.removeprefix(prefix) for name in saved if name.startswith(prefix)])
        mine = self._fixed() | {prefix + name: vector for name, vector in theirs.items()}
        check_vectors(mine, self.space.names, saved)
        if custom is not None:
            load_optimizer(custom, state["optimizer"])
        with torch.no_grad():
            for key, vector in mine.items():
                for name, view in zip(self.space.names, vector.views, strict=True):
                    view.copy_(saved[key][name])
            for name, tensor in own.items():
                tensor.copy_(state["tensors"][name])
        self.update.control.copy_(state["control"])
        self.update.overflow.zero_()
        self.update.forget_reach()
        self.step = state["step"]
        self.passes.spare.rows = state.get("rows") or self.passes.spare.rows
        if state.get("lent") is False:
            self.passes.borrow_no_more()
        self._unread = []
        if self._captured is not None:  # what the method remembers on the host is part of a graph
            self._captured = Captured(self._work, self.passes)

    def _fixed(self) -> dict[str, Vector]:
        """The vectors that are there whatever the method: the optimizer's, and the mask if there is one."""
        return self.update.moments() | ({} if self.mask is None else {"mask": self.mask})

    def finish(self) -> None:
        """The method's last word, after the last step; where that fails, the model is as it was after that step.

        Raises:
            NonFiniteError: see `check_finite`; or the method leaves weights that are not finite.
        """
        self.check_finite()
        if getattr(type(self.method), "finish", None) is Recipe.finish:
            return
        with undone(self.space, self.passes.statistics), borrowed_random(self.space.device):
            self.method.finish(self.passes, self.state)
            if not self.weights_are_finite():
                raise NonFiniteError(
                    f"finish of {type(self.method).__name__} left weights that are not finite; the model is as after "
                    f"step {self.step}. Lower what it is done with, such as alpha"
                )

    def check_finite(self) -> None:
        """Look at the flag and at every weight now.

        Raises:
            NonFiniteError: the last steps' losses or gradients were not finite, an update would have overflowed, or
                something else than an update has written what is not finite into a weight.
        """
        self.check()
        if not self.weights_are_finite():
            raise NonFiniteError(
                f"step {self.step}: weights are not finite, and no update made them so; who else has written to them?"
            )

    def weights_are_finite(self) -> bool:
        """Whether every weight that moves is; waits for the device."""
        return all(_finite(flat) for flat in self.space.theta.flats)

    @torch.inference_mode(False)
    def close(self) -> None:
        """Give the model back as it came: ordinary parameters with storage of their own.

        The vectors of the step go first, so that those parameters need no memory that the step did not have.
        """
        if not self.space.closed:
            del self.update, self.state, self.mask
        self.space.close()

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finite(flat: Tensor) -> bool:
    """Whether all of it is finite, by its extremes (NaN is one of them): `isfinite` would make copies of it."""
    return not flat.numel() or all(bool(torch.isfinite(extreme)) for extreme in flat.aminmax())


def _both(mask: Vector, own: Vector | None) -> Vector:
    """A mask and the method's own, which takes what the two have in common."""
    if own is None:
        return mask
    for mine, flat in zip(own.flats, mask.flats, strict=True):
        mine.logical_and_(flat)
    return own
