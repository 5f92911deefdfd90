"""The rows of a batch or of an output, whatever containers its tensors stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from fastlur.placement import mapped


def rows_of(value: Any) -> int | None:
    """The rows of the first tensor in it; None where there is none."""
    return next((each.shape[0] for each in tensors_of(value) if each.dim()), None)


def spaced_rows(value: Any, count: int) -> Any:
    """So many items of a batch, at equal distances; as it is where it has no rows."""
    size = rows_of(value)
    if not size:
        return value
    every = max(1, size // count)
    return _cut(value, size, slice(0, every * count, every))


def parts_of(value: Any, size: int, rows: int) -> Iterator[Any]:
    """A batch of that size in parts of so many rows, the last one smaller."""
    return (_cut(value, size, slice(at, at + rows)) for at in range(0, size, rows))


def _cut(value: Any, size: int, where: slice) -> Any:
    if isinstance(value, Tensor):
        return value[where] if value.dim() and value.shape[0] == size else value
    return _mapped(value, lambda each: _cut(each, size, where))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same container of other things, mappings of their own kind too."""
    made = mapped(value, function)
    return type(value)(**made) if isinstance(value, Mapping) and type(value) is not dict else made


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in it, in order; of an object its logits."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(each)
    elif isinstance(getattr(value, "logits", None), Tensor):
        yield value.logits
