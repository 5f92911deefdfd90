"""Data that come in batches of their own: a loader or another re-iterable, made to give the same ones again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from fastlur.errors import DataError
from fastlur.world import derive, seed_loading


class Batches:
    """A `DataLoader` or another re-iterable of batches, taken as they come, epoch after epoch.

    What the iterable draws at random, a shuffling loader for one, comes from generators seeded for each epoch and
    batch. Resuming replays the batches before the place to go on from.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        try:
            self.per_epoch: int | None = len(batches)  # type: ignore[arg-type]
        except TypeError:
            self.per_epoch = None

    def stream(self, seed: int, skip: int) -> Iterator[Any]:
        """See `fastlur.data.Source`."""
        epoch = number = 0
        while True:
            _seed(self.batches, derive(seed, "epoch", epoch))
            iterator: Iterator[Any] | None = None  # the workers of the last epoch end before those of this one begin
            iterator, begin = iter(_fresh(self.batches)), number
            while True:
                seed_loading(derive(seed, "load", number))
                try:
                    batch = next(iterator)
                except StopIteration:
                    break
                if number >= skip:
                    yield batch
                number += 1
            if number == begin:
                raise DataError(f"forget/retain: a {type(self.batches).__name__} gave no batch in epoch {epoch + 1}")
            epoch += 1

    def once(self, seed: int | None = None) -> Iterator[Any]:
        """See `fastlur.data.Source`."""
        before = [(generator, generator.get_state()) for generator in generators_of(self.batches)]
        try:
            if seed is not None:
                _seed(self.batches, seed)
            yield from _fresh(self.batches)
        finally:
            for generator, state in before:
                generator.set_state(state)


def generators_of(batches: Iterable[Any]) -> list[torch.Generator]:
    """The generators of the caller's that a loader draws its order from."""
    if not isinstance(batches, DataLoader):
        return []
    drawing = batches.sampler, batches.batch_sampler, getattr(batches.batch_sampler, "sampler", None)
    found = [batches.generator, *(getattr(each, "generator", None) for each in drawing)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def misses(batches: Iterable[Any]) -> str | None:
    """Why one pass over a loader need not show every item that another one does; None: nothing says so."""
    if not isinstance(batches, DataLoader):
        return None
    if batches.drop_last or getattr(batches.batch_sampler, "drop_last", False):
        return "drop_last=True"
    drawing = batches.sampler, getattr(batches.batch_sampler, "sampler", None)
    if any(isinstance(each, RandomSampler | WeightedRandomSampler) and each.replacement for each in drawing):
        return "a sampler that draws with replacement"
    return None


def reorders(batches: Iterable[Any]) -> bool:
    """Whether a loader may give its data set's items in another order than their own."""
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return False
    if batches.batch_sampler is not None and type(batches.batch_sampler) is not BatchSampler:
        return True
    return not isinstance(getattr(batches.batch_sampler, "sampler", batches.sampler), SequentialSampler)


def _fresh(batches: Iterable[Any]) -> Iterable[Any]:
    """A loader that keeps its workers has one iterator for all that go over it: another one, with workers of its own.

    They begin each pass anew, as those of other loaders do, so that a pass does not depend on those before it.
    """
    if not isinstance(batches, DataLoader) or not batches.persistent_workers:
        return batches
    fresh = copy.copy(batches)
    fresh._iterator = None
    if isinstance(inner := vars(batches).get("base_dataloader"), DataLoader):  # as accelerate wraps one in another
        vars(fresh)["base_dataloader"] = _fresh(inner)
    return fresh


def _seed(batches: Iterable[Any], seed: int) -> None:
    seed_loading(seed)
    for generator in generators_of(batches):
        generator.manual_seed(seed)
