"""Batches → step → observers. No mathematics here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from fastlur.data import Stream
from fastlur.errors import CheckpointError, NonFiniteError, first_line
from fastlur.history import History
from fastlur.interrupt import Interrupted
from fastlur.stats import StepStats
from fastlur.step import Step
from fastlur.world import borrowed_random

SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, steps: 1 - step / steps,
    "constant": lambda step, steps: 1.0,
}


@dataclass(frozen=True)
class StepEvent:
    """What a callback, a stopping rule or another observer gets after every step.

    Attributes:
        step: number of the step just done, from 1.
        steps: how many are planned.
        stats: its losses, cosine and norms, as 0-d tensors on the model's device; `float(event.stats.retain_loss)`
            waits for the device, looking at nothing does not.
        model: the model as it is now, undisplaced; evaluating it is fine; every pass runs in train mode,
            unless the method's docs say otherwise, whatever mode it is left in, and at the end of the run each module
            is in the mode it began in.
        seconds: wall time since the first step of this call began.
    """

    step: int
    steps: int
    stats: StepStats
    model: nn.Module
    seconds: float = 0.0


Observer = Callable[[StepEvent], Any]


def run(
    step: Step,
    forget: Stream,
    retain: Stream,
    *,
    steps: int,
    lr: Callable[[int], float],
    history: History,
    observers: Sequence[Observer] = (),
    progress: bool = True,
    interrupted: Callable[[], bool] = lambda: False,
) -> str:
    """Step until `steps` are done or an observer answers with something true; returns why it ended.

    Args:
        step: the assembled step, perhaps resumed: its own counter says where to start.
        forget: forget batches.
        retain: retain batches.
        steps: the last step's number.
        lr: learning rate of step t = 0, 1, …; units of parameter per unit of direction.
        history: filled on the way.
        observers: called in order after every step; the first true answer ends the run, as text its reason.
        progress: show a bar on standard error.
        interrupted: looked at after every step, when all observers have seen it.

    Raises:
        Interrupted: it was so; the step last counted is whole.
    """
    device, began = step.space.device, time.perf_counter()
    with tqdm(total=steps, initial=step.step, disable=not progress, desc="unlearn", unit="step") as bar:
        while step.step < steps:
            rate = lr(step.step)
            step.update.set_lr(rate)
            with _dying_of_the_same_key(step, steps, interrupted, amid=False), borrowed_random(device):
                batches = next(forget), next(retain)
            with _dying_of_the_same_key(step, steps, interrupted):
                stats = step(*batches)
            used = step.update.lr
            if history.add(stats, rate if used is None else used) and progress:
                last = {name: f"{history[name][-1]:.3f}" for name in ("forget_loss", "retain_loss", "cosine")}
                bar.set_postfix(last, refresh=False)
            bar.update()
            event = StepEvent(step.step, steps, stats, step.space.model, time.perf_counter() - began)
            for observer in observers:
                with _dying_of_the_same_key(step, steps, interrupted):
                    answer = observer(event)
                if answer:
                    history.flush()
                    return answer if isinstance(answer, str) else "stopped by a callback or rule"
            if interrupted():
                history.flush()
                raise Interrupted(f"after step {step.step} of {steps}")
    history.flush()
    return "all steps done"


@contextmanager
def _dying_of_the_same_key(
    step: Step, steps: int, interrupted: Callable[[], bool], amid: bool = True
) -> Iterator[None]:
    """Ctrl-C ends the workers of a loader as well: what fails of that, in a step or a rule, is no error of theirs.

    What failed beside it for another reason cannot be told from that; it is in the note and the cause.
    """
    try:
        yield
    except (NonFiniteError, CheckpointError):
        raise
    except Exception as error:
        if not interrupted():
            raise
        raised = Interrupted(f"after step {step.step} of {steps}")
        raised.amid = amid
        raised.add_note(f"{type(error).__name__}: {first_line(error)}")
        raise raised from error
