"""The observer that saves on the way, and what of a run it saves beside the step."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastlur.budget import RetainBudget
from fastlur.checkpoint import Checkpoints, Found
from fastlur.data import Stream
from fastlur.errors import ArgumentError, CheckpointError, FastlurError
from fastlur.history import History
from fastlur.identity import called
from fastlur.interrupt import Interrupted
from fastlur.look import here
from fastlur.loop import Observer, StepEvent
from fastlur.passes import Which
from fastlur.record import is_plain
from fastlur.step import Step


class Checkpointer:
    """Saves every so many steps; stands last among the observers, so that what they keep is that of the same step.

    Args:
        checkpoints: where to.
        step: the step.
        history: its history.
        streams: where both data streams are is written down.
        rules: stopping rules and callbacks; those with `state_dict` and `load_state_dict` are kept as well.
        budget: the retain budget, for its baseline.
        every: steps between two checkpoints.
        steps: how many are planned.
        keep: save after the last step too.
        began: when this call did, by `time.perf_counter`.

    Attributes:
        before: seconds that earlier calls took.

    Raises:
        ArgumentError: a rule or callback has a state that cannot be written.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        step: Step,
        history: History,
        streams: dict[Which, Stream],
        rules: Sequence[Observer],
        budget: RetainBudget | None,
        every: int,
        steps: int,
        keep: bool = False,
        began: float = 0.0,
    ) -> None:
        self.checkpoints, self.step, self.history, self.streams = checkpoints, step, history, streams
        self.rules = [rule for rule in rules if hasattr(rule, "state_dict") and hasattr(rule, "load_state_dict")]
        self.budget, self.every, self.steps, self.keep = budget, every, steps, keep
        self.before, self.began, self._saved = 0.0, began, -1
        for rule in self.rules:
            if not is_plain(rule.state_dict()):
                raise ArgumentError(
                    f"stop, callbacks: state_dict() of {called(rule)} holds what JSON cannot; return plain values"
                )

    def resume(self, found: Found) -> str | None:
        """Bring the run to where it was: the model last, when nothing else can fail any more.

        Returns:
            Why the run had ended, where it had.

        Raises:
            CheckpointError: what was saved does not fit; the model is as it was, and so are the rules.
        """
        record, before = found.record, [rule.state_dict() for rule in self.rules]
        try:
            try:
                ended = self._take_back(record)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
                raise CheckpointError(
                    f"checkpoint={self.checkpoints.name}: step {record.get('step')} does not fit this run: {error}"
                ) from error
            self.checkpoints.restore(self.step, found)
        except BaseException:
            for rule, state in zip(self.rules, before, strict=True):
                with suppress(Exception):  # it is the first error that says what is wrong
                    rule.load_state_dict(state)
            raise
        if self.budget is not None:
            self.budget.resume(float(record["baseline"]), self.step.step)
        self._saved = self.step.step
        mine: dict[str, Any] = here(self.step.space.device)
        theirs: Any = record.get("here")
        for name in mine if isinstance(theirs, dict) else ():
            if theirs.get(name) != mine[name]:
                warnings.warn(
                    f"checkpoint={self.checkpoints.name}: {name} was {theirs.get(name)!r}, now {mine[name]!r}; the run "
                    "goes on, and may differ in the last bits from one that was left alone",
                    stacklevel=3,
                )
        return ended

    def _take_back(self, record: dict[str, Any]) -> str | None:
        """What was saved beside the step."""
        if self.budget is not None and not math.isfinite(float(record["baseline"])):
            raise ValueError(f"the retain loss as given was {record['baseline']}")
        for side, stream in self.streams.items():
            place = {"seed": stream.seed, "taken": stream.taken}
            if record["streams"][side] != place:
                raise ValueError(f"the {side} stream was at {record['streams'][side]}, not {place}")
        ended = record.get("ended")
        if not isinstance(ended, str | None):
            raise TypeError(f"it ended for {ended!r}")
        mine = [called(rule) for rule in self.rules]
        if record["stateful"] != mine:
            raise ValueError(f"rules and callbacks with a state were {record['stateful']}, now {mine}")
        self.before = float(record["seconds"])
        if not 0 <= self.before < math.inf:
            raise ValueError(f"it had taken {self.before} s")
        self.history.restore(record["history"])
        for rule, state in zip(self.rules, record["rules"], strict=True):
            rule.load_state_dict(state)
        return ended

    def __call__(self, event: StepEvent) -> None:
        """Save, if it is time to."""
        last = event.step == event.steps
        if (event.step % self.every == 0 and not last) or (last and self.keep):
            self.save()

    def over(self, ended: str, put_back: bool = False) -> None:
        """Where checkpoints are kept: that of the last step, with the reason, unless it is there already.

        Args:
            ended: the reason.
            put_back: the model is no longer that of the last step.

        Raises:
            CheckpointError: it could not be written.
        """
        if self.keep and (put_back or self._saved != self.step.step):
            self.save(ended)

    def save(self, ended: str | None = None) -> None:
        """Save now; only a state whose losses, gradients and weights were finite is saved.

        Raises:
            CheckpointError: it could not be written.
            NonFiniteError: there is nothing worth saving.
        """
        self.step.check_finite()
        extra: dict[str, Any] = {
            "history": self.history.columns(),
            "baseline": None if self.budget is None else self.budget.baseline,
            "streams": {side: self._position(stream) for side, stream in self.streams.items()},
            "rules": [rule.state_dict() for rule in self.rules],
            "ended": ended,
            "here": here(self.step.space.device),
            "stateful": [called(rule) for rule in self.rules],
            "seconds": self.before + time.perf_counter() - self.began,
        }
        self.checkpoints.save(self.step, extra)
        self._saved = self.step.step

    def broken_off(self, error: BaseException) -> None:
        """Leave as much as there is: a checkpoint of an interrupted step, or the last one in place of ruined weights.

        With a retain budget nothing is written between its looks: what it would go back to is not in a checkpoint.
        """
        try:
            if isinstance(error, Interrupted):
                if self.budget is None and self._saved != self.step.step and not error.amid:
                    self.save()
            elif not self.step.weights_are_finite():
                found = self.checkpoints.newest()
                if found is not None:
                    self.checkpoints.restore(self.step, found)
                    error.add_note(f"the model was put back to the checkpoint of step {found.record['step']}")
        except FastlurError as other:
            error.add_note(str(other))

    def _position(self, stream: Stream) -> dict[str, int]:
        """Where a stream goes on: a step takes one batch, and one that was taken for the next does not count."""
        return {"seed": stream.seed, "taken": self.step.step}
