"""The parts of ScissorHands as they are timed. Conflicts are made, not awaited: the memory is set against the gradient.

Steps are whole ones, through the same call as LUR's, with all that it does beside the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from arms import Arm, opened
from torch import nn

from fastlur import ops
from fastlur.methods import METHODS, Trim
from fastlur.step import Step


def parts(stack: ExitStack, form: str, model: nn.Module, forget: Any, retain: Any) -> tuple[dict[str, Arm], Step]:
    """What an epoch of a form consists of, each part runnable alone on a model of its own, and the step in conflict.

    Args:
        stack: closes the steps.
        form: of ScissorHands.
        model: what copies are made of.
        forget: a batch; retain: likewise.
    """

    def made(**options: Any) -> Step:
        method = METHODS["scissorhands"](form=form, trim=None)
        return stack.enter_context(opened(model, method, forget, retain, **options))

    conflict, alone, once = in_conflict(made(), forget, retain), made(forget_batches=1), made()
    alone(forget, retain)  # after which the epoch's forget data are used up
    return {
        "step in conflict": lambda: conflict(forget, retain),
        "retain-only step": lambda: alone(forget, retain),
        "anchors, once an epoch": lambda: within(once, once.state.anchor, forget, retain),
        "trim, a batch": lambda: Trim(batches=1)(once.passes),
    }, conflict


def in_conflict(step: Step, forget: Any, retain: Any) -> Step:
    """The step after the first of its epoch, its memory set against the gradient: every further one is in conflict."""
    repair: Any = step.state
    step(forget, retain)

    def set_against() -> None:
        repair.joint_gradient()
        oppose(repair)  # and so it stays: the weights hardly move while this is measured

    within(step, set_against, forget, retain)
    return step


def oppose(repair: Any) -> None:
    """Set the first of its memories against its gradient."""
    for memory, gradient in zip(repair.memories[0].flats, repair.gradient.flats, strict=True):
        torch.neg(gradient, out=memory)


def repairs(step: Step, forget: Any, retain: Any) -> bool:
    """Whether there is still a conflict, and the step takes it away: 1 % of it may be left, which is rounding."""
    repair: Any = step.state
    memory = repair.memories[0].flats
    dots = []

    def project() -> None:
        repair.joint_gradient()
        dots.append(ops.grad_dot(repair.gradient.flats, memory)[0][0])
        repair.project()
        dots.append(ops.grad_dot(repair.gradient.flats, memory)[0][0])

    within(step, project, forget, retain)
    before, after = dots
    return bool(before < 0) and bool(after >= 0.01 * before)


def within(step: Step, part: Callable[[], object], forget: Any, retain: Any) -> None:
    """Run something of a step beside its steps."""
    with step.passes.of_step(2, forget, retain):
        part()
