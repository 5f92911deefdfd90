"""What the data hold, read once before anything changes: hashes of the items, the range of the labels, no NaN."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from fastlur.data import Indexed, Source
from fastlur.errors import DataError
from fastlur.losses import IGNORED, PREFERRED, split
from fastlur.texts import told_by_tokens
from fastlur.world import seed_loading

SAMPLE = 5_000  # items read of data that may have to be decoded; beyond that a random sample stands for the rest


@dataclass
class Content:
    """What was found.

    Attributes:
        hashes: of the distinct items read.
        count: how many were read.
        digest: one hash over all of them, in order.
        sizes: where batches were read, not items: a hash of how many items each held.
        left_out: how many were not read.
        lowest: the least label.
        highest: the greatest.
        blank: how many of the items read have labels of which none counts (−100 all over).
    """

    hashes: set[bytes] = field(default_factory=set)
    count: int = 0
    digest: str = ""
    sizes: str = ""
    left_out: int = 0
    lowest: int | None = None
    highest: int | None = None
    blank: int = 0


def read(source: Source, name: str, seed: int) -> Content:
    """Read the data called `name`: all where they are tensors in memory, else a sample if they are many.

    What reading draws at random (an order, augmentation) is fixed by `seed`, so that the same data read the same.

    Raises:
        DataError: a value is NaN or infinite.
    """
    content = Content()
    whole = _tensors(source)
    if whole is not None:
        _note(content, whole, name, "")
    over_all = blake2b(digest_size=16)
    for number, item in _items(source, content, seed):
        one, told = fingerprint(item), _told(item)
        content.hashes.add(one if told is item else fingerprint(told))
        content.count += 1
        content.blank += _blank(item)
        over_all.update(one)
        if whole is None:
            _note(content, item, name, f" in item {number}")
    content.digest = over_all.hexdigest()
    return content


def fingerprint(item: Any) -> bytes:
    """A hash of one item's values; equal items have equal hashes whatever container they come in."""
    digest = blake2b(digest_size=16)
    for part in _flatten(item):
        if isinstance(part, Tensor):
            value = part.detach().cpu()
            array = (value.double() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
        else:
            array = np.asarray(part)
        if array.ndim == 0 and array.dtype.kind in "iub":
            array = np.asarray(int(array))  # a label is a label, as a number or as a tensor
        digest.update(str(array.shape).encode())
        digest.update(repr(part).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _told(item: Any) -> Any:
    """What of an item tells it from others: of text the tokens that are no padding, and which of them count.

    Another answer, which an item to forget may come with, is none of it.
    """
    if not isinstance(item, Mapping):
        return item
    if told_by_tokens(item):
        mask = item.get("attention_mask")
        here = torch.ones_like(item["labels"], dtype=torch.bool) if mask is None else mask != 0
        return item["input_ids"][here], item["labels"][here]
    some = {name: value for name, value in item.items() if not str(name).startswith(PREFERRED)}
    return item if len(some) == len(item) else some


def _blank(item: Any) -> bool:
    targets = split(item)[1]
    if isinstance(targets, Tensor):
        return not targets.is_floating_point() and targets.numel() > 0 and bool((targets == IGNORED).all())
    return isinstance(targets, int | np.integer) and int(targets) == IGNORED


def _items(source: Source, content: Content, seed: int) -> Iterator[tuple[int, Any]]:
    data, indices = _by_index(source)
    if data is None:
        number, tensors, sizes = 0, False, blake2b(digest_size=16)
        for batch in source.once(seed):
            some = any(isinstance(part, Tensor) for part in _flatten(batch))
            if tensors and not some:  # a loss of the caller's may take text, but not now this and now that
                raise TypeError(f"a {type(batch).__name__} without a tensor among the batches, after {number} items")
            first, tensors = number, some
            for row in _rows(batch):
                yield number, row
                number += 1
            sizes.update(f"{number - first} ".encode())
        content.sizes = sizes.hexdigest()
        return
    if len(indices) > SAMPLE and not _in_memory(data):
        content.left_out = len(indices) - SAMPLE
        indices = sorted(random.Random(seed).sample(indices, SAMPLE))
    seed_loading(seed)
    for index in indices:
        yield index, _one(data, index)


def _by_index(source: Source) -> tuple[Any, Sequence[int]]:
    """The data set and the indices of it that are served, or None where only iterating tells what the items are."""
    if isinstance(source, Indexed):
        return source.items, range(source.length)
    loader = getattr(source, "batches", None)
    served = loader_indices(loader) if isinstance(loader, DataLoader) else None
    return (None, ()) if loader is None or served is None else (loader.dataset, served)


def loader_indices(loader: DataLoader[Any]) -> list[int] | None:
    """The indices of its data set that a loader serves, where its samplers are torch's own and tell; else None."""
    if not hasattr(loader.dataset, "__len__") or not hasattr(loader.dataset, "__getitem__"):
        return None
    batches: Any = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return None
    sampler: Any = loader.sampler if batches is None else batches.sampler
    if type(sampler) is SubsetRandomSampler:
        return [int(index) for index in sampler.indices]
    if type(sampler) in (SequentialSampler, RandomSampler):
        return list(range(len(loader.dataset)))
    return None


def _in_memory(data: Any) -> bool:
    while isinstance(data, Subset):
        data = data.dataset
    return isinstance(data, Mapping | tuple | Tensor | TensorDataset)


def _rows(batch: Any) -> Iterator[Any]:
    """The items of a batch, in its own shape of container."""
    sizes = {len(t) for t in _flatten(batch) if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1:
        yield batch
        return
    for index in range(sizes.pop()):
        yield _row(batch, index)


def rows(batch: Any) -> int:
    """How many items a batch has; 1 where that cannot be told."""
    sizes = {len(t) for t in _flatten(batch) if isinstance(t, Tensor) and t.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


def _row(batch: Any, index: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: _row(value, index) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_row(value, index) for value in batch]
    return batch


def _one(items: Any, index: int) -> Any:
    return _row(items, index) if isinstance(items, Mapping | tuple | Tensor) else items[index]


def _tensors(source: Source) -> Any:
    """The tensors behind data that are nothing but tensors, to be looked at as a whole."""
    if not isinstance(source, Indexed):
        return None
    if isinstance(source.items, TensorDataset):
        return tuple(source.items.tensors)
    return source.items if isinstance(source.items, Mapping | tuple | Tensor) else None


def _note(content: Content, item: Any, name: str, where: str) -> None:
    for part in _flatten(item):
        value = torch.from_numpy(part) if isinstance(part, np.ndarray) and part.dtype.kind == "f" else part
        if isinstance(value, Tensor) and isinstance(item, Mapping):
            value = value[value != -torch.inf]  # a mask that is added to attention scores is full of them
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"{name}: holds a NaN or infinite value{where}; clean or drop such items first")
    _, targets = split(item)
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel():
        low, high = int(targets.min()), int(targets.max())
    elif isinstance(targets, int | np.integer):
        low = high = int(targets)
    else:
        return
    content.lowest = low if content.lowest is None else min(low, content.lowest)
    content.highest = high if content.highest is None else max(high, content.highest)


def _flatten(item: Any) -> Iterator[Any]:
    if isinstance(item, Mapping):
        for name in sorted(item, key=str):
            yield from _flatten(item[name])
    elif isinstance(item, tuple | list):
        for part in item:
            yield from _flatten(part)
    else:
        yield item
