"""Stopping rules for `unlearn(stop=…)`: a target, patience, a time budget. Steps and epochs are its own arguments.

    from fastlur.stopping import ErrorOn, LossOn, Patience, Reached, TimeBudget

    fastlur.unlearn(model, forget, retain, steps=2000, stop=[
        Reached(ErrorOn(forget), at_least=95),        # the forget data are no longer recognised
        Patience(LossOn(validation), looks=5),        # the rest has stopped to recover
        TimeBudget(600),
    ])

A rule is any callable that takes a `fastlur.loop.StepEvent`; a true answer ends the run, a text says why. One with
`state_dict()` (plain JSON) and `load_state_dict()` goes on where it was when a run is resumed; these do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import nn

from fastlur.data import source
from fastlur.errors import ArgumentError, DataError, finite, nearest, told, unknown
from fastlur.identity import called, fingerprint
from fastlur.loop import StepEvent
from fastlur.scores import scores
from fastlur.world import borrowed_random, kept_modes

Metric = Callable[[nn.Module], float]
Better = Literal["lower", "higher"]
BATCH = 512


class _On:
    """A figure of a classifier on labelled data, in eval mode.

    Args:
        data: in any form `unlearn` takes.
        batch_size: of data that do not come in batches.

    Raises:
        DataError: no data.
    """

    def __init__(self, data: Any, batch_size: int = BATCH) -> None:
        source(data, type(self).__name__, 1)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ArgumentError(f"batch_size={batch_size!r} must be a positive whole number")
        self.data, self.batch_size = data, batch_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ErrorOn(_On):
    """The share of labelled items that the model gets wrong, in percent; on the forget data the UA of `evaluate`."""

    def __call__(self, model: nn.Module) -> float:
        """In [0, 100]."""
        return 100 - 100 * float(scores(model, self.data, "stop", self.batch_size).hit.mean())


class LossOn(_On):
    """The mean cross-entropy on labelled data, in nats."""

    def __call__(self, model: nn.Module) -> float:
        """≥ 0."""
        return float(scores(model, self.data, "stop", self.batch_size).loss.mean())


class _Looking:
    """A rule that looks at a metric every so many steps, and at the last one."""

    def __init__(self, metric: Metric, every: int) -> None:
        if not callable(metric):
            raise ArgumentError(f"metric={metric!r} cannot be called; pass model -> number, such as ErrorOn(forget)")
        _positive("every", every)
        self.metric, self.every = metric, every

    def look(self, event: StepEvent) -> float | None:
        """The metric, if it is time to look.

        Raises:
            DataError: it is no number, or cannot be had; the model is that of the step just done.
        """
        if event.step % self.every and event.step != event.steps:
            return None
        device = next(event.model.parameters()).device
        with told(DataError, f"metric: {called(self.metric)} failed"), borrowed_random(device), kept_modes(event.model):
            value: Any = self.metric(event.model)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"metric: {called(self.metric)} returned a {type(value).__name__}, no number") from error


class Reached(_Looking):
    """End the run once a metric has reached a value: a forget target, for one.

    Args:
        metric: model -> number, such as `ErrorOn(forget)`. What it draws at random, and the mode that it leaves the
            model in, are not seen by the run.
        at_least: the value to rise to.
        at_most: the value to fall to; give one of the two.
        every: steps between two looks; each is an evaluation.

    Raises:
        ArgumentError: neither or both values, or one out of range.
    """

    def __init__(
        self, metric: Metric, at_least: float | None = None, at_most: float | None = None, every: int = 10
    ) -> None:
        super().__init__(metric, every)
        if (at_least is None) == (at_most is None):
            raise ArgumentError(f"at_least={at_least!r} and at_most={at_most!r}: give one of them")
        for name, value in (("at_least", at_least), ("at_most", at_most)):
            if value is not None and not finite(value):
                raise ArgumentError(f"{name}={value!r} must be a finite number")
        self.at_least, self.at_most = at_least, at_most

    def __call__(self, event: StepEvent) -> str | None:
        """See `fastlur.stopping`."""
        value = self.look(event)
        if value is None:
            return None
        if self.at_least is not None and value >= self.at_least:
            return f"{called(self.metric)} reached {value:.4g}, at least {self.at_least:g}"
        if self.at_most is not None and value <= self.at_most:
            return f"{called(self.metric)} reached {value:.4g}, at most {self.at_most:g}"
        return None

    def __repr__(self) -> str:
        bound = f"at_least={self.at_least}" if self.at_most is None else f"at_most={self.at_most}"
        return f"Reached({fingerprint(self.metric)}, {bound}, every={self.every})"


class Patience(_Looking):
    """End the run once a metric has not improved for a number of looks. The model stays as it is then.

    Args:
        metric: model -> number, such as `LossOn(validation)`; see `Reached`.
        looks: how many looks without an improvement, ≥ 1.
        every: steps between two looks.
        better: "lower" or "higher".
        by: the least that counts as an improvement, ≥ 0.

    Raises:
        ArgumentError: a value out of range.
    """

    def __init__(
        self, metric: Metric, looks: int = 5, every: int = 10, better: Better = "lower", by: float = 0.0
    ) -> None:
        super().__init__(metric, every)
        _positive("looks", looks)
        if unknown(better, get_args(Better)):
            raise ArgumentError(f"better={better!r} is unknown; {nearest(better, get_args(Better))}")
        if not finite(by) or by < 0:
            raise ArgumentError(f"by={by!r} must be a finite number ≥ 0")
        self.looks, self.better, self.by = looks, better, by
        self.best, self.waited = math.inf, 0

    def __call__(self, event: StepEvent) -> str | None:
        """See `fastlur.stopping`."""
        if event.step == 1:  # another run
            self.best, self.waited = math.inf, 0
        value = self.look(event)
        if value is None:
            return None
        signed = value if self.better == "lower" else -value
        if signed < self.best - self.by:
            self.best, self.waited = signed, 0
            return None
        self.waited += 1
        if self.waited < self.looks:
            return None
        best = self.best if self.better == "lower" else -self.best
        return f"{called(self.metric)} has not improved on {best:.4g} for {self.waited} looks"

    def state_dict(self) -> dict[str, float | None]:
        """The best value so far, the lower the better, and how many looks ago it was."""
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best = math.inf if state["best"] is None else float(state["best"])
        self.waited = int(state["waited"])

    def __repr__(self) -> str:
        metric = fingerprint(self.metric)
        return f"Patience({metric}, looks={self.looks}, every={self.every}, better={self.better!r}, by={self.by})"


class TimeBudget:
    """End the run once it has taken so long, what it took before interruptions included.

    Args:
        seconds: of wall time since the first step, > 0. The step that goes beyond is the last one.

    Raises:
        ArgumentError: it is not a positive number.
    """

    def __init__(self, seconds: float) -> None:
        if not finite(seconds) or seconds <= 0:
            raise ArgumentError(f"seconds={seconds!r} must be a positive number, such as 600")
        self.seconds = seconds
        self._before = self.spent = 0.0

    def __call__(self, event: StepEvent) -> str | None:
        """See `fastlur.stopping`."""
        if event.step == 1:
            self._before = 0.0
        self.spent = self._before + event.seconds
        if self.spent < self.seconds:
            return None
        return f"{self.spent:.1f} s are over, of {self.seconds:g}"

    def state_dict(self) -> dict[str, float]:
        """The seconds so far."""
        return {"spent": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._before = self.spent = float(state["spent"])

    def __repr__(self) -> str:
        return f"TimeBudget({self.seconds})"


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name}={value!r} must be a positive whole number")
