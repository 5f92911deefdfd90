"""Everything that is refused before a parameter changes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlur.content import Content
from fastlur.data import to_device
from fastlur.errors import ArgumentError, DataError, FastlurError, ModelError, nearest, number, told, unknown
from fastlur.leaves import Reached
from fastlur.losses import IGNORED, logits_and_targets
from fastlur.microbatch import Spare
from fastlur.passes import Loss, Which
from fastlur.statistics import Statistics
from fastlur.value import scalar
from fastlur.world import borrowed_random, passing

PRECISIONS = ("fp32", "bf16")
FLAGS = ("compile", "deterministic", "keep_checkpoints", "allow_overlap", "progress")


def positive_int(name: str, value: object) -> None:
    """Refuse anything but a positive whole number.

    Raises:
        ArgumentError: it is not one.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name}={value!r} must be a positive whole number")


def positive_ints(**values: object) -> None:
    """Refuse anything but positive whole numbers.

    Raises:
        ArgumentError: one is none.
    """
    for name, value in values.items():
        positive_int(name, value)


def flags(*values: object, names: Iterable[str] = FLAGS) -> None:
    """Refuse anything but True and False (1 and 0 count) for the switches of these names, by default `unlearn`'s.

    Raises:
        ArgumentError: one is neither.
    """
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, int) or value not in (0, 1):
            raise ArgumentError(f"{name}={value!r} must be True or False")


def callables(name: str, values: object) -> list[Any]:
    """The callables in a list, or none for None.

    Raises:
        ArgumentError: it is not a list of callables.
    """
    try:
        found = [] if values is None else list(values) if isinstance(values, Iterable) else [values]
    except TypeError:  # a 0-d tensor says that it can be iterated over
        found = [values]
    for value in found:
        if not callable(value):
            raise ArgumentError(f"{name}: {value!r} cannot be called; it must take a fastlur.loop.StepEvent")
    return found


def losses(**given: object) -> None:
    """Refuse what cannot be a loss.

    Raises:
        ArgumentError: one is neither None nor callable.
    """
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ArgumentError(f"{name}: a {type(value).__name__} cannot be called; pass (model, batch) -> scalar")


def path(name: str, value: object) -> None:
    """Refuse what is no path.

    Raises:
        ArgumentError: it is neither None, a string nor a path, or it is empty.
    """
    if value is not None and (not isinstance(value, str | os.PathLike) or not os.fspath(value)):
        raise ArgumentError(f"{name}={value!r} must be a directory's path, or None")


def module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        ModelError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: a {type(model).__name__} is no torch.nn.Module")


def seed(value: object) -> None:
    """Refuse what is no seed.

    Raises:
        ArgumentError: it is no whole number.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentError(f"seed={value!r} must be a whole number")


def memory_format(value: object) -> None:
    """Refuse what four-dimensional weights cannot be laid out in.

    Raises:
        ArgumentError: it is neither None nor a format for four dimensions.
    """
    known = torch.channels_last, torch.contiguous_format, torch.preserve_format
    if value is not None and not (isinstance(value, torch.memory_format) and value in known):
        raise ArgumentError(f"memory_format={value!r} must be torch.channels_last, torch.contiguous_format, or None")


def rate(lr: object) -> None:
    """Refuse what is no learning rate.

    Raises:
        ArgumentError: it is none.
    """
    if not number(lr):
        raise ArgumentError(f"lr={lr!r} must be a finite number ≥ 0, such as 0.03")


def clipping(method: object, given: float | None) -> float | None:
    """The norm that directions are clipped to: as given, or what is usual with the method; None: they are not."""
    found: float | None = getattr(method, "max_grad_norm", None) if given is None else given
    return None if found == math.inf else found


def numbers(lr: float, momentum: float, weight_decay: float, max_grad_norm: float | None, precision: str) -> None:
    """Refuse what the update of a step cannot be made with.

    Raises:
        ArgumentError: a number is out of its range, or the precision is unknown.
    """
    rate(lr)
    if not (number(momentum) and momentum < 1):
        raise ArgumentError(f"momentum={momentum!r} must be in [0, 1), such as 0.9")
    if not number(weight_decay):
        raise ArgumentError(f"weight_decay={weight_decay!r} must be a finite number ≥ 0")
    unclipped = max_grad_norm is None or (isinstance(max_grad_norm, float) and max_grad_norm == math.inf)
    if not unclipped and not (number(max_grad_norm) and max_grad_norm > 0):
        raise ArgumentError(f"max_grad_norm={max_grad_norm!r} must be a positive number, math.inf or None")
    if unknown(precision, PRECISIONS):
        raise ArgumentError(f"precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}")


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ArgumentError: with the nearest one.
    """
    if unknown(value, known):
        raise ArgumentError(f"{name}={value!r} is unknown; {nearest(value, known)}")


def length(steps: int | None, epochs: float | None) -> None:
    """Refuse a length that is not positive, or given twice.

    Raises:
        ArgumentError: see above.
    """
    if steps is not None and epochs is not None:
        raise ArgumentError(f"steps={steps!r} and epochs={epochs!r}: give one of them")
    if steps is not None:
        positive_int("steps", steps)
    if epochs is not None and not (isinstance(epochs, int | float) and 0 < epochs < math.inf):
        raise ArgumentError(f"epochs={epochs!r} must be a positive number")


def evaluated(method: Any) -> list[tuple[Which, Which]]:
    """The sides that a run passes over, each with the side whose loss is taken there.

    A trim, a mask and methods that say so take the retain loss of the forget data, whatever the steps do with these.
    """
    found: list[tuple[Which, Which]] = [("retain", "retain")]
    if getattr(method, "uses_forget", True):
        found.append(("forget", "forget"))
    parts = (getattr(method, part, None) for part in ("trim", "mask"))
    if getattr(method, "measures_forget", False) or any(part is not None for part in parts):
        found.append(("forget", "retain"))
    return found


class Tried(NamedTuple):
    """A loss to be tried on a side, the argument it is, and whether it is the task's own, which wants labels."""

    which: Which
    argument: str
    loss: Loss
    classifies: bool


class How(NamedTuple):
    """How passes are made: on which device, in which precision, in train or in eval mode."""

    device: torch.device
    precision: str
    training: bool


def trial(
    model: nn.Module,
    losses: list[Tried],
    batches: dict[Which, Any],
    contents: dict[Which, Content],
    how: How,
    moving: list[tuple[str, nn.Parameter]],
    micro_batch: int | None = None,
) -> int | None:
    """Evaluate the losses once as a step would, leaving no trace: no gradient, no statistics, no random state.

    Returns:
        How many items at a time the model has memory for, `micro_batch` at most; None: whole batches.

    Raises:
        ArgumentError: a loss cannot be called.
        ModelError: it has not, and cannot take a batch in parts; or no loss depends on what is to move.
        DataError: the model or a loss cannot take a batch, a label is outside the logits, no item has a label that
            counts, a loss is not a finite scalar, or batch norm cannot work with so small a batch.
    """
    spare, reached = Spare(model, model, micro_batch), Reached(model, moving)

    def attempt(each: Tried, batch: Any) -> None:
        what = f"{each.which}: the model or {each.argument} cannot take the first batch"
        with told(DataError, what), _items_for_batch_norm(each.which):
            if each.classifies:
                _labels(spare.forward, batch, contents[each.which], each.which)
            value = each.loss(spare.forward, batch)
        reached.note(value)
        _value(value, each)

    for which in dict.fromkeys(each.which for each in losses):
        _labelled(which, [each for each in losses if each.which == which], contents[which])
    with borrowed_random(how.device), passing(model, *how), Statistics(model).frozen():
        for each in losses:
            batch = to_device(batches[each.which], how.device)
            spare.run(partial(attempt, each, batch), batch)
    reached.check()
    return spare.rows


def _labelled(which: Which, losses: list[Tried], content: Content) -> None:
    """Items without a label that counts add nothing to a loss of ours; of nothing else, there is nothing to learn."""
    if not content.blank:
        return
    if content.blank < content.count:
        few = f"{content.blank} of {content.count} items have no label that counts, only {IGNORED}"
        warnings.warn(f"{which}: {few}; they change nothing", stacklevel=4)
        return
    message = (
        f"{which}: none of {content.count} items has a label that counts, all are {IGNORED}, as where a text is cut "
        "off before its answer; label what is to count"
    )
    if any(each.classifies or each.loss.__module__.split(".")[0] == "fastlur" for each in losses):
        raise DataError(message)
    warnings.warn(message, stacklevel=4)


def _labels(model: Any, batch: Any, content: Content, which: Which) -> None:
    logits, targets = logits_and_targets(model, batch)
    classes, low, high = logits.shape[-1], int(targets.min()), int(targets.max())
    for label in (low, high, content.lowest, content.highest):
        if label is not None and not (0 <= label < classes or label == IGNORED):
            raise DataError(
                f"{which}: label {label} is outside the model's {classes} logits; labels go from 0 to {classes - 1}"
            )


def _value(value: Any, tried: Tried) -> None:
    number = float(scalar(value, tried.argument).detach())
    if not math.isfinite(number):
        raise DataError(
            f"{tried.argument}: is {number} on the first {tried.which} batch; look for NaN in data, model or loss"
        )


@contextmanager
def _items_for_batch_norm(which: Which) -> Iterator[None]:
    """Inside, batch norm that has one item is a `DataError` that says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FastlurError) or "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            f"{which}: batch norm needs more than one item a batch here; give more items, or a larger batch_size"
        ) from error
