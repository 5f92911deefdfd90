"""What tells one run from another: the model, the data, the losses and the optimizer as plain values."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from hashlib import blake2b
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
HASH = re.compile(r"#[0-9a-f]{16}$")
SETTINGS = "settings of the model"  # of which what only one of two runs has is not compared
OWN = __name__.split(".")[0]
DEEP = 8  # how far a value is followed into what it holds
PLAIN = str | int | float | complex | bool | bytes | None


def model_digest(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers, those included that its state_dict leaves out."""
    return _of_tensors(dict(model.named_buffers(), **model.state_dict()))


def state_digest(model: nn.Module) -> str | None:
    """A hash of what a model's state_dict holds; None where that cannot be read, on the meta device for one."""
    try:
        return _of_tensors(model.state_dict())
    except Exception:  # whatever it is, the run that asks is over and must not fail of it
        return None


def _of_tensors(state: Mapping[str, Any]) -> str:
    digest = blake2b(digest_size=16)
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_content(tensor))
    return digest.hexdigest()


def architecture_digest(model: nn.Module) -> str:
    """A hash of the kinds of modules by name, with what torch's own say of their settings (a dropout rate, a stride).

    The code of a forward is not looked at.
    """
    digest = blake2b(digest_size=16)
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        digest.update(f"{name}:{kind.__module__}.{kind.__qualname__}".encode())
        if kind.__module__.startswith("torch."):  # others may show addresses
            digest.update(module.extra_repr().encode())
    return digest.hexdigest()


def model_settings(model: nn.Module) -> dict[str, str]:
    """The numbers with a point and the switches that modules of the caller's hold as attributes: a dropout rate, say.

    Whole numbers are left out, since a module may count with them, texts, which may be places of files, and whether
    activations are made again, which changes no result.
    """
    return {
        f"{name}.{key}".lstrip("."): repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not type(module).__module__.startswith("torch.")
        and isinstance(value, bool | float)
        and not (key.startswith("_") or key in ("training", "gradient_checkpointing"))
    }


def name_of(value: Any, deep: int = 2) -> str:
    """Where a callable or another object is from, with its plain numbers; for messages and for records.

    Nothing else of what it holds: a text, an array or a hash of them could be what was to be forgotten. Of objects of
    this package texts are shown as well.
    """
    kind = value if hasattr(value, "__qualname__") else type(value)
    if isinstance(value, partial):
        held, place = [*enumerate(value.args), *value.keywords.items()], name_of(value.func, deep)
    else:
        held, place = [] if kind is value else sorted(getattr(value, "__dict__", {}).items()), _place(kind)
    own = place.startswith(f"{OWN}.")
    told = (int, float, str) if own else (int, float)
    parts = []
    for name, each in held:
        named = "" if isinstance(name, int) else f"{name}="
        if each is None or isinstance(each, told):
            parts += [f"{named}{each!r}"] if not named.startswith("_") and named != "training=" else []
        elif callable(each) and deep:
            parts.append(named + name_of(each, deep - 1))
    if isinstance(kind, type) and own and kind is not value:
        place = kind.__qualname__
    return f"{place}({', '.join(parts)})" if kind is not value or isinstance(value, partial) else place


def called(value: Any) -> str:
    """Where a callable is from, for a message."""
    if isinstance(value, partial):
        return called(value.func)
    return _place(value if hasattr(value, "__qualname__") else type(value))


def without_hashes(value: Any) -> Any:
    """Plain values whose fingerprints have lost their hashes, by which guesses of what went into them can be tested."""
    if isinstance(value, dict):
        return {name: without_hashes(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_hashes(each) for each in value]
    return HASH.sub("", value) if isinstance(value, str) else value


def fingerprint(function: Any, apart_from: tuple[type, ...] = ()) -> str:
    """Its name with a hash of what it does and holds, the same in another process.

    Of a function: code, defaults and what it closes over. Of a `partial`: function and arguments. Of a module: the
    kinds of its parts, their settings, weights and buffers. Of another object: its attributes and the code of its
    class; where it has none, how it shows itself. What it holds is followed likewise. Two things are not compared:
    attributes whose names begin with "_", where an object may note what it sees on its way, and global names that code
    refers to.

    Args:
        function: a callable, or any other object.
        apart_from: kinds of things that are not looked into.
    """
    digest = blake2b(digest_size=8)
    for part in _Parts(apart_from).of(function, DEEP, set()):
        digest.update(part + b"\0")
    return f"{name_of(function)}#{digest.hexdigest()}"


class _Parts:
    """What values are made of, as bytes in a fixed order; an object that is met again is only named again."""

    def __init__(self, apart_from: tuple[type, ...]) -> None:
        self.apart_from = apart_from
        self.met: dict[int, tuple[int, Any]] = {}  # with the objects, so that no other one gets their number

    def of(self, value: Any, deep: int, above: set[int]) -> list[bytes]:
        """Of one value."""
        if isinstance(value, PLAIN):
            return [f"{type(value).__name__} {value!r}".encode()]
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            value = value.tolist()
        if isinstance(value, Tensor | np.ndarray):
            raw = _content(value) if isinstance(value, Tensor) else np.ascontiguousarray(value).tobytes()
            return [f"{tuple(value.shape)}{value.dtype}".encode(), bytes(raw)]
        if not deep or id(value) in above:
            return [b"and so on"]
        found, inner = [_place(type(value)).encode()], {*above, id(value)}
        if isinstance(value, self.apart_from):
            return found
        if hasattr(value, "__dict__") and not isinstance(value, type | ModuleType):
            if id(value) in self.met:
                return [f"number {self.met[id(value)][0]} again".encode()]
            self.met[id(value)] = len(self.met), value
        for name, item in _held(value):
            found += [name.encode(), *self.of(item, deep - 1, inner)]
        return found


def _held(value: Any) -> list[tuple[str, Any]]:
    """The values that one holds, by names."""
    if isinstance(value, CodeType):
        constants = [("constant", each) for each in value.co_consts]
        return [("code", value.co_code), ("names", value.co_names), ("variables", value.co_varnames), *constants]
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        closed = [(name, _cell(cell)) for name, cell in cells]
        given = [("defaults", value.__defaults__), ("named defaults", value.__kwdefaults__)]
        return [("where", _place(value)), ("code", value.__code__), *given, *closed]
    if isinstance(value, MethodType):
        return [("function", value.__func__), ("of", value.__self__)]
    if isinstance(value, partial):
        return [("function", value.func), ("arguments", value.args), ("named", value.keywords)]
    if isinstance(value, Mapping):
        return [(_line(key), item) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return [("items", item) for item in sorted(map(_line, value))]
    if isinstance(value, tuple | list | deque):
        return [("item", item) for item in value]
    if isinstance(value, nn.Module):
        modules = [(f"{n}:{_place(type(m))}", each) for n, m in value.named_modules() for each in _attributes(m)]
        return [("weights", model_digest(value)), *modules, *_code(type(value))]
    if isinstance(value, type | BuiltinFunctionType | ModuleType) or hasattr(value, "__qualname__"):
        return [("where", _place(value))]
    attributes = _attributes(value)
    shown = [] if attributes or not _shows_itself(value) else [("shown", _line(value))]
    return [*attributes, *shown, *_code(type(value))]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """What an object is set to, and not what it notes on its way."""
    slots = (name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ())))
    held = {name: getattr(value, name) for name in slots if not name.startswith("_") and hasattr(value, name)}
    held |= {name: each for name, each in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    return sorted(held.items(), key=lambda each: each[0])


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _code(kind: type) -> list[tuple[str, Any]]:
    """The functions of a class, of whose code no version number tells."""
    classes = [each for each in kind.__mro__ if each.__module__.split(".")[0] not in ("builtins", "torch", OWN)]
    return [
        (name, each) for one in classes for name, each in sorted(vars(one).items()) if isinstance(each, FunctionType)
    ]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _shows_itself(value: Any) -> bool:
    """Whether it has a text of its own, as what `object` gives says nothing but an address."""
    own: Any = type(value).__repr__
    return own is not object.__repr__ and own is not nn.Module.__repr__


def _line(value: Any) -> str:
    try:
        return " ".join(ADDRESS.sub("", repr(value)).split())
    except Exception:  # a text of the caller's
        return _place(type(value))


def _place(kind: Any) -> str:
    return f"{getattr(kind, '__module__', None)}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"


def _content(tensor: Tensor) -> Any:
    """The bytes of a tensor of whatever kind."""
    value = tensor.detach()
    if value.layout != torch.strided or value.is_quantized:
        value = value.dequantize() if value.is_quantized else value.to_dense()
    value = value.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return value.view(torch.uint8).numpy().data


def shown(rule: Any) -> str:
    """An object that shows its settings by them, anything else by its fingerprint: what it notes may differ."""
    made = isinstance(rule, partial) or is_dataclass(rule) or hasattr(rule, "__qualname__")
    return fingerprint(rule) if made or not _shows_itself(rule) else _line(rule)


def code_of(method: object) -> list[str]:
    """The functions of a class from outside of this package, of whose code a version number does not tell."""
    kind = type(method)
    if kind.__module__.split(".")[0] == OWN:
        return []
    return [fingerprint(each) for each in vars(kind).values() if isinstance(each, FunctionType)]


def optimizer_settings(optimizer: str | torch.optim.Optimizer) -> Any:
    """An optimizer's name, and the numbers of its parameter groups if it is the caller's."""
    if isinstance(optimizer, str):
        return optimizer
    groups = [
        {name: _plain(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    return {"name": type(optimizer).__name__, "groups": groups}


def optimizer_parameters(optimizer: str | torch.optim.Optimizer, model: nn.Module) -> list[list[str]] | None:
    """The names of the parameters of each group, in order; None for an optimizer of ours."""
    if isinstance(optimizer, str):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = (group["params"] for group in optimizer.param_groups)
    return [[names.get(id(each), f"another of shape {tuple(each.shape)}") for each in group] for group in groups]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
