"""Nested states as plain JSON and named tensors, and back. Whatever is neither is refused, so nothing is pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON for any nesting of dicts, lists, tuples and numbers, its tensors moved into `tensors`.

    Raises:
        TypeError: there is something else in it.
    """
    if isinstance(value, Tensor):
        name, count = path, 0
        while name in tensors:  # two paths of one text, by keys with a slash
            name, count = f"{path}#{count}", count + 1
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str | int | float | None) for key in value):
            raise TypeError(f"{path}: only text and numbers can be keys")
        return {"dict": [[key, pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, str | int | float | bool | None):
        return {"plain": value}
    raise TypeError(f"{path}: a {type(value).__name__} cannot be written")


def unpack(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """What `pack` was given; `tensor` gives one by its name."""
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensor(content)
        case "dict":
            return {key: unpack(item, tensor) for key, item in content}
        case "list":
            return [unpack(item, tensor) for item in content]
        case "tuple":
            return tuple(unpack(item, tensor) for item in content)
        case "plain":
            return content
    raise ValueError(f"{kind!r} is no kind of value")
