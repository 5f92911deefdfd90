"""The errors of the package. Every one is a `FastlurError`; each message names the argument, the value, the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch


class FastlurError(Exception):
    """Base of everything this package raises on purpose."""


class ArgumentError(FastlurError, ValueError):
    """An argument is of the wrong kind or out of its range; nothing was changed."""


class ModelError(FastlurError, ValueError):
    """The model cannot be used as asked: nothing to move, a pattern without a match, no module."""


class DataError(FastlurError, ValueError):
    """The forget or retain data are empty, overlap, are not finite, or do not fit the model or the loss."""


class NonFiniteError(FastlurError, ArithmeticError):
    """A loss or a gradient was not finite, or an update would overflow; the model is as after the last good step.

    Attributes:
        step: in which, from 1; None before the first, and where it is not known.
        sides: whose batch it may be: "forget", "retain" or both.
        tensor: the name of the first parameter (or buffer) that is not finite, or whose gradient is not, or that an
            update would have taken furthest; None where that is not known.
    """

    def __init__(
        self, message: str, step: int | None = None, sides: tuple[str, ...] = (), tensor: str | None = None
    ) -> None:
        super().__init__(message)
        self.step, self.sides, self.tensor = step, sides, tensor


class CheckpointError(FastlurError, RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another run."""


class RecordError(FastlurError, RuntimeError):
    """A record of a run cannot be written or read, or is not intact."""


def number(value: object) -> TypeGuard[float]:
    """Whether the value is a finite number ≥ 0."""
    return finite(value) and value >= 0


def finite(value: object) -> TypeGuard[float]:
    """Whether the value is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    if isinstance(value, int):
        return abs(value) < 2**63  # more do not fit into a tensor's
    return math.isfinite(value)


def first_line(error: BaseException) -> str:
    """What somebody else's error says, as far as it fits into a message of one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on a device or on the host, whose allocator has no error of its own."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    )


@contextmanager
def told(kind: type[FastlurError], what: str, remedy: str = "") -> Iterator[None]:
    """Inside, what code of the caller's raises becomes an error of this package.

    Ours and a lack of memory (see `lacks_memory`) stay what they are.

    Args:
        kind: of the error.
        what: its message begins with this; what was raised follows in parentheses.
        remedy: it ends with this.
    """
    try:
        yield
    except Exception as error:  # such code raises what it likes
        if isinstance(error, FastlurError) or lacks_memory(error):
            raise
        raise kind(f"{what} ({type(error).__name__}: {first_line(error)}){remedy}") from error


def check_flags(**values: object) -> None:
    """Refuse anything but True and False.

    Raises:
        ArgumentError: one is neither.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}={value!r} must be True or False")


def unknown(value: object, known: Iterable[str]) -> bool:
    """Whether a value is none of these names; of whatever kind it is, a tensor or an array too."""
    return not isinstance(value, str) or value not in tuple(known)


def nearest(name: object, known: Iterable[str]) -> str:
    """'did you mean …' and the whole list, for a name that is not in it."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def not_scalar(name: str, value: object) -> str:
    """What is wrong with a loss that returned `value`."""
    shape = getattr(value, "shape", None)
    what = f"a {type(value).__name__}" if shape is None else f"a tensor of shape {tuple(shape)}"
    return f"{name}: returned {what}, not a scalar; reduce it, for example with .mean()"
