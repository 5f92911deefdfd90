"""From what a user calls data to an endless, seeded, resumable stream of batches.

Taken as data: a tuple of tensors (inputs, targets, …) of one length, a dict of such tensors, a `Dataset`, a
`DataLoader` (its batches, workers and sampler are respected), or any re-iterable of batches. A batch may be any nesting
of tuples, lists and dicts of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from fastlur.batches import Batches, generators_of, misses, reorders
from fastlur.errors import DataError
from fastlur.placement import to_device as to_device
from fastlur.world import derive, seed_loading

NAMED = 8  # items of a batch that a message names
NOTED = 64  # batches that were not the run's own; a step is looked at 32 steps late at most


class Source(Protocol):
    """Data of one kind, as batches."""

    per_epoch: int | None

    def stream(self, seed: int, skip: int) -> Iterator[Any]:
        """Batches without end in an order that `seed` fixes, from number `skip` on."""
        ...

    def once(self, seed: int | None = None) -> Iterator[Any]:
        """Every item once; what is drawn at random on the way is fixed by `seed`, if there is one."""
        ...


class Indexed:
    """Tensors or a map-style data set: batches of one size, drawn without replacement, epoch after epoch.

    The permutations of all epochs are laid end to end and cut into batches, so that every item comes equally often and
    no batch is short; a batch may hold the end of one epoch and the start of the next. Batch k depends on the seed and
    k alone.
    """

    def __init__(self, items: Any, length: int, batch_size: int) -> None:
        self.items, self.length = items, length
        self.batch_size = min(batch_size, length)
        self.per_epoch: int | None = -(-length // self.batch_size)

    def stream(self, seed: int, skip: int) -> Iterator[Any]:
        """See `Source`."""
        number = skip
        while True:
            index = self.indices(seed, number)
            seed_loading(derive(seed, "load", number))
            yield self.take(index)
            number += 1

    def once(self, seed: int | None = None) -> Iterator[Any]:
        """See `Source`."""
        if seed is not None:
            seed_loading(seed)
        for begin in range(0, self.length, self.batch_size):
            yield self.take(torch.arange(begin, min(begin + self.batch_size, self.length)))

    def indices(self, seed: int, number: int) -> Tensor:
        """The items of batch `number` of the stream with that seed, shape (batch_size,)."""
        begin = number * self.batch_size
        epochs = range(begin // self.length, (begin + self.batch_size - 1) // self.length + 1)
        order = torch.cat([self._order(seed, epoch) for epoch in epochs])
        within = begin - epochs[0] * self.length
        return order[within : within + self.batch_size]

    def _order(self, seed: int, epoch: int) -> Tensor:
        if getattr(self, "_cached", None) != (seed, epoch):
            generator = torch.Generator().manual_seed(derive(seed, "order", epoch))
            self._cached, self._permutation = (seed, epoch), torch.randperm(self.length, generator=generator)
        return self._permutation

    def take(self, index: Tensor) -> Any:
        """These items as a batch."""
        if isinstance(self.items, Mapping):
            return {name: _rows(value, index) for name, value in self.items.items()}
        if isinstance(self.items, tuple):
            return tuple(_rows(value, index) for value in self.items)
        if isinstance(self.items, Tensor):
            return _rows(self.items, index)
        return _collate(self.items)([self.items[i] for i in index.tolist()])


def source(data: Any, name: str, batch_size: int) -> Source:
    """Recognise what the user passed as `name` ("forget" or "retain").

    Raises:
        DataError: it is empty, of unequal lengths, an iterator that can be read only once, or nothing known.
    """
    found = _source(data, name, batch_size)
    if found.per_epoch == 0:
        raise DataError(f"{name}: is empty; pass at least one {'batch' if isinstance(found, Batches) else 'item'}")
    return found


def _source(data: Any, name: str, batch_size: int) -> Source:
    if isinstance(data, Tensor):
        return _indexed(data, [data], name, batch_size)
    if isinstance(data, Mapping):
        return _indexed(dict(data), list(data.values()), name, batch_size)
    if isinstance(data, tuple) or (isinstance(data, list) and len(data) == 2 and _tensors(data)):
        return _indexed(tuple(data), list(data), name, batch_size)
    if isinstance(data, DataLoader):
        return Batches(data)
    if isinstance(data, IterableDataset):
        return Batches(DataLoader(data, batch_size=batch_size))
    if isinstance(data, Dataset) or (
        hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, list | str | bytes)
    ):
        try:
            length = len(data)  # type: ignore[arg-type]
        except Exception as error:  # no length, a negative one, or what a data set of the caller's raises
            raise DataError(f"{name}: a {type(data).__name__} without a length; give it __len__, or wrap it") from error
        return Indexed(data, length, batch_size) if length else Batches([])
    if isinstance(data, Iterator):
        raise DataError(f"{name}: a {type(data).__name__} can be read only once; pass list(…) or a DataLoader")
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return Batches(data)
    raise DataError(
        f"{name}: a {type(data).__name__} is no data; pass (inputs, targets), a Dataset, a DataLoader or batches"
    )


def _indexed(items: Any, tensors: Sequence[Any], name: str, batch_size: int) -> Source:
    if not tensors:
        return Batches([])
    if not _tensors(tensors):
        kinds = ", ".join(type(value).__name__ for value in tensors)
        raise DataError(f"{name}: holds {kinds}; every part must be a tensor with one row an item")
    lengths = [len(value) if value.dim() else None for value in tensors]
    if len(set(lengths)) > 1 or lengths[0] is None:
        raise DataError(f"{name}: its tensors have {lengths} rows; inputs and targets must pair up")
    return Indexed(items, lengths[0], batch_size) if lengths[0] else Batches([])


def _tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _collate(items: Any) -> Callable[[list[Any]], Any]:
    """How a data set wants its items put together: by its own `collate`, as text that needs padding has."""
    while isinstance(items, Subset):
        items = items.dataset
    own: Callable[[list[Any]], Any] = getattr(items, "collate", default_collate)
    return own


def _rows(value: Tensor, index: Tensor) -> Tensor:
    return value[index.to(value.device)]


class Feed:
    """The data of both sides, for what a method does before or between steps (a mask, a Fisher, a membership attack).

    Args:
        sources: "forget" and "retain".
        seed: fixes what is drawn.
        device: where batches are wanted.
        memory_format: of four-dimensional tensors.
    """

    def __init__(
        self,
        sources: Mapping[Any, Source],
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        self._sources, self._seed, self._device, self._memory_format = sources, seed, device, memory_format
        self._instead: dict[tuple[str, int], tuple[int, int]] = {}

    def per_epoch(self, side: str) -> int | None:
        """Batches in one pass over a side; None where the data do not tell."""
        return self._sources[side].per_epoch

    def misses(self, side: str) -> str | None:
        """Why one pass over a side need not show all its items; None: it does, as far as can be told."""
        found = self._sources[side]
        return misses(found.batches) if isinstance(found, Batches) else None

    def reorders(self, side: str) -> bool:
        """Whether a side may give its items in another order than their own."""
        found = self._sources[side]
        return isinstance(found, Batches) and reorders(found.batches)

    def instead(self, side: str, step: int, draw: object, number: int) -> None:
        """Note that a step took batch `number` of `epoch(side, draw)`, so that a late message can say what it was."""
        self._instead[side, step] = derive(self._seed, "feed", side, draw), number
        while len(self._instead) > NOTED:
            del self._instead[next(iter(self._instead))]

    def _place(self, side: str, step: int) -> tuple[int, int]:
        """The seed of the stream that a step's batch is from, and its number there."""
        return self._instead.get((side, step), (derive(self._seed, side), step - 1))

    def where(self, side: str, step: int) -> str:
        """What the batch of a side in a step is, in words."""
        source = self._sources[side]
        seed, number = self._place(side, step)
        if isinstance(source, Indexed):
            index = source.indices(seed, number).tolist()
            more = f", … ({len(index)})" if len(index) > NAMED else ""
            return f"item{'s' * (len(index) > 1)} {', '.join(map(str, index[:NAMED]))}{more}"
        count = source.per_epoch
        if (side, step) in self._instead:
            return f"number {number + 1} of an epoch of its own"
        return f"number {number % count + 1} of epoch {number // count + 1}" if count else f"number {step}"

    def of_step(self, side: str, step: int) -> Any:
        """The batch of a side in a step, read again; random state is seeded on the way."""
        stream = Stream(self._sources[side], *self._place(side, step))
        try:
            return to_device(next(stream), self._device, self._memory_format)
        finally:
            stream.close()

    def batches(self, side: str, limit: int | None = None, draw: object = 0) -> Iterator[Any]:
        """Every item of a side once, in batches on the device; with `limit` that many batches, drawn at random.

        The same `draw` gives the same batches. Random state is seeded on the way: see `borrowed_random`.
        """
        source, seed = self._sources[side], derive(self._seed, "feed", side, draw)
        if limit is None:
            for batch in source.once(seed):
                yield to_device(batch, self._device, self._memory_format)
            return
        stream = Stream(source, seed)
        try:
            for _ in range(min(limit, source.per_epoch or limit)):
                yield to_device(next(stream), self._device, self._memory_format)
        finally:
            stream.close()

    def epoch(self, side: str, draw: object) -> Callable[[int], Any]:
        """One pass over a side in random order: a function from a batch's number, from 0, to the batch on the device.

        The same `draw` gives the same batches, in whatever order. A data set is read as asked; of a loader, which knows
        no number and must know its length, all are held on the host.
        """
        source, seed = self._sources[side], derive(self._seed, "feed", side, draw)

        def taken(skip: int, count: int) -> list[Any]:
            stream = Stream(source, seed, skip)
            try:
                return [next(stream) for _ in range(count)]
            finally:
                stream.close()

        held = None if isinstance(source, Indexed) else taken(0, source.per_epoch or 0)

        def batch(number: int) -> Any:
            raw = taken(number, 1)[0] if held is None else held[number]
            return to_device(raw, self._device, self._memory_format)

        return batch


class Stream:
    """An endless stream of batches, and how many of it have been taken.

    Random state that reading draws on is seeded batch by batch; run it inside `fastlur.world.borrowed_random`.
    """

    def __init__(self, source: Source, seed: int, skip: int = 0) -> None:
        self.seed, self.taken = seed, skip
        self._generators = generators_of(getattr(source, "batches", ()))
        self._before = [generator.get_state() for generator in self._generators]
        self._batches = source.stream(seed, skip)

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.taken += 1
        return batch

    def __iter__(self) -> Stream:
        return self

    def close(self) -> None:
        """End a loader's workers, and put the caller's generators back."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)
