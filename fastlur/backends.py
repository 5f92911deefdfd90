"""Which code serves a vector operation: plain torch, Triton, or the compiled extension; and why the others do not."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastlur import _extension, reference
from fastlur.errors import ArgumentError, lacks_memory, nearest

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
NAMES = ("torch", "triton", "extension")
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
# What was found out once: the backend in service by (wish, device type, whether the extension is loaded), and the
# verdict on the Triton kernels.
_resolved: dict[tuple[str | None, str, bool], tuple[str, ModuleType]] = {}
_triton: list[str | None] = []


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, the vector operations of this thread are served by this backend: "torch", "triton" or "extension".

    That is a context variable: it holds in this thread and in asyncio tasks begun inside, not in other threads, whose
    numbers are not to change because of a choice made here. The environment variable FASTLUR_BACKEND asks for one in
    the whole process.

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
    wish = _wish()
    if wish:
        reason = unavailable(_known(wish), device_type)
        if reason is not None:
            raise ArgumentError(f"backend={wish!r} cannot serve {device_type} tensors: {reason}")
        return wish
    candidates = PREFERENCE.get(device_type, ("torch",))
    return next(name for name in candidates if unavailable(name, device_type) is None)


def resolve(device_type: str) -> tuple[str, ModuleType]:
    """Who serves tensors of a device type now: the name, and the module with the namesakes of `fastlur.reference`."""
    key = _wish(), device_type, _extension.loaded()
    found = _resolved.get(key)
    if found is None:
        name = serving(device_type)
        found = name, _module(name)
        if device_type != "cuda" or _triton or name == key[0] != "triton":  # not on the word of a probe put off
            _resolved[key] = found
    return found


def unavailable(name: str, device_type: str) -> str | None:
    """Why a backend cannot serve tensors on a device type; None when it can."""
    if name == "torch":
        return None
    if name == "extension":
        return _extension.missing(device_type)
    if device_type != "cuda":
        return "Triton kernels run on CUDA tensors"
    return _triton_fault()


def _wish() -> str | None:
    return _forced.get() or os.environ.get(VARIABLE) or None


def describe(fused: bool = True) -> dict[str, Any]:
    """For each device type: who serves, why the others do not, and what the code of each has been through.

    Args:
        fused: whether it is an operation that every backend has; plain torch serves what they have not.
    """
    found: dict[str, Any] = {}
    _extension.load()  # so that all that is said here is said of one state of things
    for device_type in ("cpu", "cuda"):
        if device_type == "cuda" and not torch.cuda.is_available():
            why = {name: _without_device(name) for name in NAMES}
            found[device_type] = {"served_by": None, "because": "no CUDA device", "others": why}
        elif not fused:
            others = {name: "has no kernel of it" for name in NAMES if name != "torch"}
            found[device_type] = {"served_by": "torch", "others": others}
        else:
            try:
                name, _ = resolve(device_type)
            except ArgumentError as error:
                found[device_type] = {"served_by": None, "because": str(error)}
            else:
                others = {other: _why_not(other, name, device_type) for other in NAMES if other != name}
                found[device_type] = {"served_by": name, "others": others}
        found[device_type]["checked"] = {name: CHECKED[name, where] for name, where in CHECKED if where == device_type}
    return found


def _without_device(name: str) -> str:
    """Why a backend does not serve CUDA tensors where there is no such device: what else it lacks, if anything."""
    if name == "extension":
        return _extension.missing("cuda") or "no CUDA device"
    if name == "triton":
        return "no CUDA device" if importlib.util.find_spec("triton") else "triton is not installed"
    return "no CUDA device" if torch.version.cuda or torch.version.hip else "this torch was built without CUDA"


def _why_not(other: str, name: str, device_type: str) -> str:
    return unavailable(other, device_type) or f"{name} comes first ({VARIABLE}={other} asks for this one)"


def _known(name: str) -> str:
    if name not in NAMES:
        raise ArgumentError(f"backend={name!r} is unknown; {nearest(name, NAMES)}")
    return name


@cache
def _module(name: str) -> ModuleType:
    if name == "torch":
        return reference
    return _extension if name == "extension" else importlib.import_module("fastlur.kernels")


def _triton_fault() -> str | None:
    """Why the Triton kernels cannot be trusted here: not there, not compiling, or wrong on a first small sum.

    The verdict is kept. While a CUDA graph is captured nothing can be tried, so they are taken to be fine until then;
    and what may pass, such as memory that is full at the moment, is tried again at the next call.
    """
    if _triton:
        return _triton[0]
    if torch.cuda.is_current_stream_capturing():
        return None
    try:
        fault = _probe()
    except Exception as error:  # whatever a compiler or a driver can raise means: use another backend
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
        if lacks_memory(error):
            return fault
    _triton.append(fault)
    return fault


def _probe(device: str = "cuda") -> str | None:
    """One small sum on the device."""
    kernels = importlib.import_module("fastlur.kernels")
    x = torch.arange(1.0, 2050.0, device=device)
    total = kernels.grad_dot([x], [x])[0].cpu()
    expected = float(x.double().square().sum())
    return None if abs(float(total[0]) - expected) <= 1e-5 * expected else "gave a wrong sum on this device"
