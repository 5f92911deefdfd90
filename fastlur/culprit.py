"""Which tensor it was, when a loss or a gradient is not finite: looked for once, after the fact."""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from fastlur.errors import NonFiniteError
from fastlur.methods.base import Direction
from fastlur.passes import Passes, Which
from fastlur.placement import tensors
from fastlur.space import ParameterSpace, Vector
from fastlur.stats import StepStats
from fastlur.world import borrowed_random

SIDES: tuple[Which, Which] = ("forget", "retain")
FIGURES = ("forget_loss", "retain_loss", "forget_norm", "retain_norm", "cosine")
REMEDY = "Lower lr, inner_lr or forget_weight, or look for NaN in the data"


def accuse(
    passes: Passes, bad: StepStats, nothing: Tensor, direction: Direction | None, batches: dict[Which, Any] | None
) -> NonFiniteError:
    """The error that names the step, its batches and the tensor.

    Args:
        passes: of the run; nothing has moved since before the bad step.
        bad: what the bad step saw.
        nothing: the value that stands for a side without a pass, which is no fault.
        direction: that of the bad step; None: it is gone, and is found as far as it can be by making passes again.
        batches: those of the bad step; None: they are read again, if they can be.
    """
    if batches is None and passes.has_feed:
        with suppress(Exception), borrowed_random(passes.space.device):
            batches = {side: passes.feed.of_step(side, bad.step) for side in SIDES}
    figures = [name for name in FIGURES if getattr(bad, name) is not nothing and not _finite(getattr(bad, name))]
    with borrowed_random(passes.space.device):
        sides, tensor, what = _found(passes, bad.step, direction, batches)
    figure = next((name for name in figures if name.startswith(sides)), next(iter(figures), "loss"))
    said = [
        f"step {bad.step}: {figure} is not finite (forget loss {float(bad.forget_loss):.4g}, retain loss "
        f"{float(bad.retain_loss):.4g})",
        *([what] if what else []),
        *(f"{side} batch: {passes.feed.where(side, bad.step)}" for side in sides if passes.has_feed),
        f"the model is as after step {bad.step - 1}. {REMEDY}",
    ]
    return NonFiniteError("; ".join(said), bad.step, sides, tensor)


def overflowed(space: ParameterSpace, step: int, direction: Direction | None) -> NonFiniteError:
    """The error that names the step whose update would have made a weight infinite, and the tensor furthest from 0.

    Args:
        space: of the run.
        step: number of the step that was not made.
        direction: its direction; None: it is gone, and no tensor is named.
    """
    name, kinds = None, sorted({str(flat.dtype).removeprefix("torch.") for flat in space.theta.flats})
    if direction is not None:
        halves = [vector.views for vector in (direction.retain, direction.forget) if vector is not None]
        sizes = [
            sum(float(view.abs().max()) if view.numel() else 0.0 for view in each) for each in zip(*halves, strict=True)
        ]
        name = space.names[max(range(len(sizes)), key=sizes.__getitem__)]
    where = "" if name is None else f", most in {name!r}"
    return NonFiniteError(
        f"step {step}: the update would overflow {' or '.join(kinds)}{where}, and was not made; the model is as after "
        f"step {step - 1}. Lower lr, or set max_grad_norm",
        step,
        SIDES,
        name,
    )


def _found(
    passes: Passes, step: int, direction: Direction | None, batches: dict[Which, Any] | None
) -> tuple[tuple[Which, ...], str | None, str]:
    """The sides it may be, the name of the tensor, and what there is to say about it."""
    space, model = passes.space, passes.space.model
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not _finite(value.detach()):
            return SIDES, name, f"{name!r} itself is not finite: an update overflowed, or it was given so"
    if batches is not None:  # at θ, before anything is displaced by a gradient that is not finite itself
        found: dict[Which, list[str]] = {}
        for side in SIDES:
            scratch = space.vector()
            with suppress(Exception), ExitStack() as stack:  # what fails here must not hide what is to be said
                stack.enter_context(passes.of_step(step, batches["forget"], batches["retain"]))
                stack.enter_context(passes.aside(batches, passes.training))
                passes.gradient(side, scratch)
            if names := _bad(passes, scratch):
                found[side] = names
        spoiled = [side for side in found if not all(map(_finite, tensors(batches[side])))]
        if spoiled == ["retain"] and passes.borrows:  # by whose statistics the forget loss is not finite either
            found = {"retain": found["retain"]}
        if found:
            (first, names), *_ = found.items()
            itself = f"the {spoiled[0]} batch itself holds a value that is not, " if spoiled else ""
            return tuple(found), names[0], itself + _where(names, f"∇({first} loss)")
    for vector in () if direction is None else (direction.forget, direction.retain):
        if vector is not None and (names := _bad(passes, vector)):
            return SIDES, names[0], _where(names, "the direction")
    return SIDES, None, ""


def _where(names: list[str], what: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"first in {what} for {names[0]!r}{more}"


def _bad(passes: Passes, vector: Vector) -> list[str]:
    return [name for name, view in zip(passes.space.names, vector.views, strict=True) if not _finite(view)]


def _finite(value: Tensor) -> bool:
    return math.isfinite(value) if value.numel() == 1 else bool(torch.isfinite(value).all())
