"""Which code serves a vector operation: plain torch, Triton, or the compiled extension; and why the others do not."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastlur import _extension, reference
from fastlur.errors import ArgumentError, nearest

OPERATIONS = (
    "grad_dot",
    "displace",
    "project",
    "regularize",
    "step_control",
    "meta_update",
    "extrapolate",
    "saliency",
)
VARIABLE = "FASTLUR_BACKEND"
PREFERENCE = {"cpu": ("extension", "torch"), "cuda": ("triton", "extension", "torch")}

# What a backend's code has been through. An entry changes when a result from a GPU is committed to bench/results.
CHECKED = {
    ("torch", "cpu"): "tested",
    ("torch", "cuda"): "not measured on a GPU",
    ("triton", "cuda"): "interpreter only",
    ("extension", "cpu"): "tested",
    ("extension", "cuda"): "compiled only",
}

_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, every vector operation is served by this backend: "torch", "triton" or "extension".

    The environment variable FASTLUR_BACKEND does the same for a whole process.

    Raises:
        ArgumentError: no such backend. One that cannot serve a device raises when it is asked to.
    """
    _known(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def serving(device_type: str) -> str:
    """The name of the backend that serves tensors on "cpu" or "cuda" now.

    Raises:
        ArgumentError: the one asked for cannot, with the reason.
    """
    wish = _forced.get() or os.environ.get(VARIABLE)
    if wish:
        reason = unavailable(_known(wish), device_type)
        if reason is not None:
            raise ArgumentError(f"backend={wish!r} cannot serve {device_type} tensors: {reason}")
        return wish
    candidates = PREFERENCE.get(device_type, ("torch",))
    return next(name for name in candidates if unavailable(name, device_type) is None)


def function(operation: str, device_type: str) -> Callable[..., Any]:
    """The function that serves an operation, with the signature of its namesake in `fastlur.reference`."""
    found: Callable[..., Any] = getattr(_module(serving(device_type)), operation)
    return found


@cache
def unavailable(name: str, device_type: str) -> str | None:
    """Why a backend cannot serve tensors on a device type; None when it can."""
    if name == "torch":
        return None
    if name == "extension":
        return _extension.missing(device_type)
    if device_type != "cuda":
        return "Triton kernels run on CUDA tensors"
    return _triton_fault()


def describe() -> dict[str, Any]:
    """For each device type: the backend in service, what it has been through, and why the others are not."""
    found: dict[str, Any] = {}
    for device_type in ("cpu", "cuda"):
        if device_type == "cuda" and not torch.cuda.is_available():
            found[device_type] = {"served_by": None, "because": "no CUDA device"}
            continue
        try:
            name = serving(device_type)
        except ArgumentError as error:
            found[device_type] = {"served_by": None, "because": str(error)}
            continue
        others = {other: _why_not(other, name, device_type) for other in ("torch", "triton", "extension")}
        others.pop(name)
        found[device_type] = {"served_by": name, "state": CHECKED[name, device_type], "others": others}
    return found


def _why_not(other: str, name: str, device_type: str) -> str:
    return unavailable(other, device_type) or f"{name} comes first ({VARIABLE}={other} asks for this one)"


def _known(name: str) -> str:
    names = ("torch", "triton", "extension")
    if name not in names:
        raise ArgumentError(f"backend={name!r} is unknown; {nearest(name, names)}")
    return name


@cache
def _module(name: str) -> ModuleType:
    if name == "torch":
        return reference
    return _extension if name == "extension" else importlib.import_module("fastlur.kernels")


def _triton_fault() -> str | None:
    """Why the Triton kernels cannot be trusted here: not there, not compiling, or wrong on a first small sum."""
    try:
        kernels = importlib.import_module("fastlur.kernels")
        x = torch.arange(1.0, 2050.0, device="cuda")
        total = kernels.grad_dot([x], [x])[0].cpu()
    except Exception as error:  # whatever a compiler or a driver can raise means: use another backend
        return f"{type(error).__name__}: {error}".splitlines()[0]
    expected = float(x.double().square().sum())
    return None if abs(float(total[0]) - expected) <= 1e-5 * expected else "gave a wrong sum on this device"
