"""What tells one run from another: the model, the data, the losses and the optimizer as plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from hashlib import blake2b
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
DEEP = 8  # how far a value is followed into what it holds
PLAIN = str | int | float | complex | bool | bytes | None


def model_digest(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers, those included that its state_dict leaves out."""
    digest = blake2b(digest_size=16)
    for name, tensor in dict(model.named_buffers(), **model.state_dict()).items():
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


def name_of(function: Any) -> str:
    """What a callable is called in a message or a record: its settings where it shows them, else where it is from."""
    if isinstance(function, partial):
        given = [*map(_shown, function.args), *(f"{name}={_shown(value)}" for name, value in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(given)})"
    if not hasattr(function, "__qualname__") and _shows_itself(function):
        return _line(function)
    return _place(function if hasattr(function, "__qualname__") else type(function))


def fingerprint(function: Any) -> str:
    """Its name with a hash of what it does and holds, the same in another process.

    Of a function: code, defaults and what it closes over. Of a `partial`: function and arguments. Of a module: the
    kinds of its parts, their settings, weights and buffers. Of another object: its settings where it shows them, else
    its plain attributes. Global names that code refers to are not followed, nor are objects that are none of these.
    """
    digest = blake2b(digest_size=8)
    for part in _parts(function, DEEP, set()):
        digest.update(part + b"\0")
    return f"{name_of(function) if callable(function) else _place(type(function))}#{digest.hexdigest()}"


def _parts(value: Any, deep: int, above: set[int]) -> list[bytes]:
    """What a value is made of, as bytes in a fixed order."""
    if isinstance(value, PLAIN):
        return [f"{type(value).__name__} {value!r}".encode()]
    if isinstance(value, Tensor | np.ndarray):
        tensor = value if isinstance(value, Tensor) else None
        raw = _content(tensor) if tensor is not None else np.ascontiguousarray(value).tobytes()
        return [f"{tuple(value.shape)}{value.dtype}".encode(), bytes(raw)]
    if not deep or id(value) in above:
        return [b"and so on"]
    found, inner = [_place(type(value)).encode()], {*above, id(value)}
    for name, item in _held(value):
        found += [name.encode(), *_parts(item, deep - 1, inner)]
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
    if isinstance(value, tuple | list):
        return [("item", item) for item in value]
    if isinstance(value, nn.Module):
        modules = [(f"{n}:{_place(type(m))}", each) for n, m in value.named_modules() for each in _attributes(m)]
        return [("weights", model_digest(value)), *modules]
    if isinstance(value, type | BuiltinFunctionType) or hasattr(value, "__qualname__"):
        return [("where", _place(value))]
    if _shows_itself(value):
        return [("shown", _line(value))]
    return list(_attributes(value))


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """The plain ones: settings, not what it notes on its way, nor what it uses."""
    kinds = (PLAIN, tuple, Tensor, FunctionType, partial)
    held = sorted(getattr(value, "__dict__", {}).items())
    return [(name, each) for name, each in held if not name.startswith("_") and isinstance(each, kinds)]


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
    return " ".join(ADDRESS.sub("", repr(value)).split())


def _place(kind: Any) -> str:
    return f"{getattr(kind, '__module__', None)}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"


def _shown(value: Any) -> str:
    return name_of(value) if callable(value) else _line(value)


def _content(tensor: Tensor) -> Any:
    """The bytes of a tensor of whatever kind."""
    value = tensor.detach()
    if value.layout != torch.strided or value.is_quantized:
        value = value.dequantize() if value.is_quantized else value.to_dense()
    value = value.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return value.view(torch.uint8).numpy().data


def shown(rule: Any) -> str:
    """An object that shows its settings by them, anything else by its fingerprint: what it notes may differ."""
    itself = _shows_itself(rule) and not isinstance(rule, partial) and not hasattr(rule, "__qualname__")
    return _line(rule) if itself else fingerprint(rule)


def code_of(method: object) -> list[str]:
    """The functions of a class from outside of this package, of whose code a version number does not tell."""
    kind = type(method)
    if kind.__module__.split(".")[0] == __name__.split(".")[0]:
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


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
