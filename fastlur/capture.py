"""A step as a CUDA graph: recorded once, replayed afterwards, without a launch of its own for every kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlur.errors import ArgumentError, ModelError
from fastlur.placement import mapped, tensors

WARM_UP = 3  # steps made as usual first: lazy initialisations, and "optimistic" begins unlike it goes on
Work = Callable[[Any, Any], tuple[Tensor, ...]]
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


class Draws(Protocol):
    """What makes passes, and notes in `drew` whether one moved a random generator; None: nobody asked."""

    drew: bool | None


class Captured:
    """Work on a forget and a retain batch, replayed from a graph where they have the form it was recorded with.

    Batches of another form, such as the last of an epoch or one with another number beside its tensors, are worked on
    as usual. What the work reads beside the batches and writes beside its results must stay where it is in memory.

    Args:
        work: of the two batches; returns tensors of fixed shapes. It may not wait for the device.
        passes: what makes the passes of the work.
    """

    def __init__(self, work: Work, passes: Draws) -> None:
        self._work, self._passes = work, passes
        self._left = WARM_UP
        self._replay: Callable[[], None] | None = None
        self._static: list[Tensor] = []
        self._form: object = None
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, forget: Any, retain: Any) -> tuple[Tensor, ...]:
        """The results, new tensors."""
        if self._left:
            self._left -= 1
            if not self._left:  # passes of the first steps may draw for reasons of their own, such as a compiler's
                self._passes.drew = False
            return self._work(forget, retain)
        given = form((forget, retain))
        if given is None:
            return self._work(forget, retain)
        if self._replay is None:
            self._record(forget, retain)
        if given != self._form:
            return self._work(forget, retain)
        for static, value in zip(self._static, tensors((forget, retain)), strict=True):
            static.copy_(value)
        assert self._replay is not None
        self._replay()
        return tuple(result.clone() for result in self._results)

    def _record(self, forget: Any, retain: Any) -> None:
        if self._passes.drew:
            raise ModelError(
                "capture=True: the model draws random numbers in its passes (dropout?), which a graph would draw anew "
                "in every one; leave capture off, or set the probability to 0"
            )
        self._passes.drew = None  # a generator must not be asked while a graph is recorded
        self._form = form((forget, retain))
        forget, retain = cloned(forget), cloned(retain)
        self._static = list(tensors((forget, retain)))

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


def form(batch: Any) -> object:
    """What a graph takes for granted in a batch: its structure, shapes, dtypes, and every plain value in full.

    None where the batch holds something else, which may hold anything in its turn.
    """
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype
    parts: list[object]
    if isinstance(batch, Mapping):
        parts = [form((name, value)) for name, value in batch.items()]
    elif isinstance(batch, list | tuple) and not isinstance(batch, torch.Size):
        parts = [form(value) for value in batch]
    else:
        return (type(batch), repr(batch)) if isinstance(batch, PLAIN) else None
    return None if None in parts else (type(batch), parts)


def cloned(batch: Any) -> Any:
    """The batch with tensors of its own."""
    if isinstance(batch, Tensor):
        return batch.clone(memory_format=torch.preserve_format)
    return mapped(batch, cloned)


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
