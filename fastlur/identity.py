"""What tells one run from another: the model, the data, the losses and the optimizer as plain values."""

from __future__ import annotations

from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn


def model_digest(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers, those included that its state_dict leaves out."""
    digest = blake2b(digest_size=16)
    for name, tensor in dict(model.named_buffers(), **model.state_dict()).items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
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
    """What tells a callable from another in a record: its settings where it shows them, else where it was defined."""
    if isinstance(function, partial):
        given = [*map(_shown, function.args), *(f"{name}={_shown(value)}" for name, value in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(given)})"
    if not hasattr(function, "__qualname__") and "__repr__" in vars(type(function)):
        return repr(function)
    owner: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"


def _shown(value: Any) -> str:
    return name_of(value) if callable(value) else repr(value)


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
