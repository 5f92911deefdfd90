"""Do the retain data contain what is to be forgotten? The commonest mistake, and one that undoes the whole run."""

from __future__ import annotations

import warnings
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset

from fastlur.content import Content, loader_indices
from fastlur.errors import DataError

REMEDY = "take them out of retain (or pass allow_overlap=True if that is meant)"


def check(forget: Any, retain: Any, forget_content: Content, retain_content: Content) -> None:
    """Refuse retain data that hold forget items.

    Two subsets of one data set are compared by index, anything else by hashes of the items that were read: all of them,
    or a sample where they may have to be decoded and are many, of which a warning tells.

    Raises:
        DataError: they share items.
    """
    ours, theirs = _indices(forget), _indices(retain)
    if ours is not None and theirs is not None and ours[0] is theirs[0]:
        shared, asked = len({*ours[1]} & {*theirs[1]}), len({*ours[1]})
    else:
        shared = len(forget_content.hashes & retain_content.hashes)
        asked = len(forget_content.hashes)
        for name, content in (("forget", forget_content), ("retain", retain_content)):
            if content.left_out and not shared:
                warnings.warn(
                    f"{name}: only {len(content.hashes)} items, drawn at random, were compared to see whether retain "
                    f"contains forget items; {content.left_out} were not",
                    stacklevel=3,
                )
    if shared:
        raise DataError(f"retain: contains {shared} of {asked} forget items; {REMEDY}")


def _indices(data: Any) -> tuple[object, list[int]] | None:
    """The data set at the bottom and the indices taken of it, where that can be told without reading."""
    if isinstance(data, DataLoader):
        below, served = _indices(data.dataset), loader_indices(data)
        return None if below is None or served is None else (below[0], [below[1][i] for i in served])
    if isinstance(data, Subset):
        below = _indices(data.dataset)
        return None if below is None else (below[0], [below[1][i] for i in data.indices])
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        return data, list(range(len(data)))
    return None
