"""The observer that saves on the way, and what of a run it saves beside the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlur.budget import RetainBudget
from fastlur.checkpoint import Checkpoints, Found
from fastlur.data import Stream
from fastlur.errors import CheckpointError, FastlurError
from fastlur.history import History
from fastlur.interrupt import Interrupted
from fastlur.loop import Observer, StepEvent
from fastlur.passes import Which
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
        keep: save after the last step too.
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
        keep: bool = False,
    ) -> None:
        self.checkpoints, self.step, self.history, self.streams = checkpoints, step, history, streams
        self.rules = [rule for rule in rules if hasattr(rule, "state_dict") and hasattr(rule, "load_state_dict")]
        self.budget, self.every, self.keep = budget, every, keep

    def resume(self, found: Found) -> None:
        """Take back what was saved beside the step.

        Raises:
            CheckpointError: it does not fit.
        """
        record = found.record
        try:
            self.history.restore(record["history"])
            if self.budget is not None:
                self.budget.resume(float(record["baseline"]))
            for side, stream in self.streams.items():
                if record["streams"][side] != self._position(stream):
                    raise ValueError(
                        f"the {side} stream was at {record['streams'][side]}, not {self._position(stream)}"
                    )
            for rule, state in zip(self.rules, record["rules"], strict=True):
                rule.load_state_dict(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint={self.checkpoints.name}: step {record['step']} does not fit this run: {error}"
            ) from error

    def __call__(self, event: StepEvent) -> None:
        """Save, if it is time to."""
        last = event.step == event.steps
        if (event.step % self.every == 0 and not last) or (last and self.keep):
            self.save()

    def save(self) -> None:
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
        }
        self.checkpoints.save(self.step, extra)

    def broken_off(self, error: BaseException) -> None:
        """Leave as much as there is: a checkpoint of an interrupted step, or the last one in place of ruined weights.

        With a retain budget nothing is written between its looks: what it would go back to is not in a checkpoint.
        """
        try:
            if isinstance(error, Interrupted):
                if self.budget is None:
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
