"""Data as one batch that rows can be taken from, and a model that an attacker may do with as he likes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastlur.data import source, to_device
from fastlur.errors import ArgumentError, DataError, ModelError, told
from fastlur.fresh import copied
from fastlur.losses import split
from fastlur.world import borrowed_random, seed_loading

BATCH = 256


def gather(data: Any, name: str, device: torch.device, seed: int, most: int | None = None) -> Any:
    """All items, or the first `most` in the order of the data, as one labelled batch on a device.

    Raises:
        DataError: data that cannot be read, are not labelled, or hold something other than tensors.
    """
    with borrowed_random(device):
        seed_loading(seed)
        with told(DataError, f"{name}: cannot be taken as one batch"):
            size = BATCH if most is None else max(1, min(BATCH, most))
            batches = list(islice(source(data, name, size).once(seed), None if most is None else most))
            whole = to_device(_joined(batches), device)
            targets = split(whole)[1]
            if not isinstance(targets, Tensor) or targets.is_floating_point() or not targets.numel():
                raise DataError(f"{name}: must be labelled with integer classes, one batch (inputs, targets)")
    return whole if most is None else rows(whole, torch.arange(min(most, count(whole))))


def count(batch: Any) -> int:
    """Items in a labelled batch."""
    return len(split(batch)[1])


def rows(batch: Any, index: Tensor) -> Any:
    """Some items of a batch, in its own shape of container."""
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)]
    if isinstance(batch, Mapping):
        return {name: rows(value, index) for name, value in batch.items()}
    return tuple(rows(value, index) for value in batch)


def joined(*batches: Any) -> Any:
    """Batches of one kind, end to end.

    Raises:
        DataError: they are of different kinds.
    """
    with told(DataError, "retain: its batches are of another kind than those of forget"):
        return _joined(list(batches))


def own_copy(model: Any, name: str) -> nn.Module:
    """A copy in eval mode of which every floating-point parameter asks for a gradient.

    Raises:
        ModelError: it is no module, or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: a {type(model).__name__} is no torch.nn.Module")
    mine = copied(model, name)
    for parameter in mine.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    return mine.eval()


def device_of(model: nn.Module) -> torch.device:
    """Where it is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def whole(name: str, value: object, low: int = 1) -> int:
    """A whole number of at least `low`.

    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ArgumentError(f"{name}={value!r} must be a whole number ≥ {low}")
    return value


def _joined(batches: list[Any]) -> Any:
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {name: _joined([batch[name] for batch in batches]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(_joined(list(part)) for part in zip(*batches, strict=True))
    raise TypeError(f"a {type(first).__name__} is no tensor")
