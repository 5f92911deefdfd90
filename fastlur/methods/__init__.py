"""The methods, one file each. A method is a class with `prepare`, `direction` and `finish` (see `base.Method`)."""

from __future__ import annotations

from fastlur.errors import ArgumentError, nearest
from fastlur.methods.base import Method
from fastlur.methods.lur import LUR

METHODS: dict[str, type[Method]] = {"lur": LUR}


def available() -> dict[str, str]:
    """The methods by name, each with one line about it."""
    return {name: (method.__doc__ or "").strip().splitlines()[0] for name, method in METHODS.items()}


def resolve(method: str | Method) -> Method:
    """A method by name with its defaults, or the instance itself.

    Raises:
        ArgumentError: no such name (the nearest one is suggested), or not a method.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ArgumentError(f"method={method!r} is unknown; {nearest(method, METHODS)}")
        return METHODS[method]()
    if isinstance(method, type) or not all(callable(getattr(method, part, None)) for part in PARTS):
        raise ArgumentError(f"method={method!r} is neither a name nor an instance with {', '.join(PARTS)}")
    return method


PARTS = ("prepare", "direction", "finish")
