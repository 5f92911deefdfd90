"""Batches, whatever containers their tensors stand in, and where the model is, in the layout it wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device, memory_format: torch.memory_format | None = None) -> Any:
    """The batch with every tensor on the device, four-dimensional ones in the memory format asked for."""
    if isinstance(batch, Tensor):
        if batch.is_inference():  # made under inference_mode: autograd refuses it, a copy it takes
            batch = batch.clone()
        if memory_format is not None and batch.dim() == 4:
            return batch.to(device, non_blocking=True, memory_format=memory_format)
        return batch.to(device, non_blocking=True)
    return mapped(batch, lambda value: to_device(value, device, memory_format))


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(part)


def mapped(batch: Any, function: Callable[[Any], Any]) -> Any:
    """The same container with the function of each part: a dict for any mapping, a named tuple for one of its kind."""
    if isinstance(batch, Mapping):
        return {name: function(part) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [function(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
