"""Batches where the model is, in the layout it wants."""

from __future__ import annotations

from collections.abc import Mapping
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
    if isinstance(batch, Mapping):
        return {name: to_device(value, device, memory_format) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device, memory_format) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device, memory_format) for value in batch)
    return batch
