"""A step as a CUDA graph: recorded once, replayed afterwards, without a launch of its own for every kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlur.errors import ArgumentError, ModelError

WARM_UP = 3  # steps made as usual first: lazy initialisations, and "optimistic" begins unlike it goes on
Work = Callable[[Any, Any], tuple[Tensor, ...]]


class Captured:
    """Work on a forget and a retain batch, replayed from a graph where they have the shapes it was recorded with.

    Batches of other shapes, such as the last of an epoch, are worked on as usual. What the work reads beside the
    batches and writes beside its results must stay where it is in memory.

    Args:
        work: of the two batches; returns tensors of fixed shapes. It may not wait for the device.
        device: a CUDA device.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work, self._device = work, device
        self._left = WARM_UP
        self._replay: Callable[[], None] | None = None
        self._static: list[Tensor] = []
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, forget: Any, retain: Any) -> tuple[Tensor, ...]:
        """The results, new tensors."""
        if self._left:
            self._left -= 1
            return self._work(forget, retain)
        given = [*tensors(forget), *tensors(retain)]
        if self._replay is None:
            self._record(forget, retain)
        if [(x.shape, x.dtype) for x in given] != [(x.shape, x.dtype) for x in self._static]:
            return self._work(forget, retain)
        for static, value in zip(self._static, given, strict=True):
            static.copy_(value)
        assert self._replay is not None
        self._replay()
        return tuple(result.clone() for result in self._results)

    def _record(self, forget: Any, retain: Any) -> None:
        if drew_random_numbers(self._device):
            raise ModelError(
                "capture=True: the model draws random numbers in its passes (dropout?), which a graph would draw anew "
                "in every one; leave capture off, or set the probability to 0"
            )
        forget, retain = cloned(forget), cloned(retain)
        self._static = [*tensors(forget), *tensors(retain)]

        def work() -> None:
            self._results = self._work(forget, retain)

        self._replay = record(work)


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Record what the work launches, without doing it; the returned function does it."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def drew_random_numbers(device: torch.device) -> bool:
    """Whether the last pass, which began by seeding the device's generator, has drawn from it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(torch.cuda.default_generators[index].get_offset())


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors(value)]
    if isinstance(batch, list | tuple):
        return [tensor for value in batch for tensor in tensors(value)]
    return []


def cloned(batch: Any) -> Any:
    """The batch with tensors of its own."""
    if isinstance(batch, Tensor):
        return batch.clone(memory_format=torch.preserve_format)
    if isinstance(batch, Mapping):
        return type(batch)({name: cloned(value) for name, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        parts = [cloned(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def check_capture(device: torch.device, optimizer: object) -> None:
    """Refuse to record what cannot be recorded.

    Raises:
        ArgumentError: the model is on no CUDA device, or the optimizer is torch's.
    """
    if device.type != "cuda":
        raise ArgumentError(f"capture=True: needs a CUDA device, and the model is on {device}; leave it off")
    if not isinstance(optimizer, str):
        raise ArgumentError(
            "capture=True: needs 'sgd' or 'adamw': an optimizer of torch's decides on the host; leave it off"
        )
