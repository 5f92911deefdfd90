"""Items of text told by their tokens: the same ones, however a batch is padded and whatever stands beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlur.errors import DataError
from fastlur.losses import IGNORED, PREFERRED

ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # of the finaliser of SplitMix64 (Steele et al. 2014)
STRIDE = 0x9E3779B97F4A7C15
TOKENS = {"input_ids", "labels", "attention_mask", "token_type_ids", "position_ids"}


def told_by_tokens(item: Any) -> bool:
    """Whether an item, or a batch of them, is text with nothing beside it but another answer.

    Its tokens must be there, and those that the mask leaves out must not count.
    """
    if not isinstance(item, Mapping) or not {"input_ids", "labels"} <= set(item):
        return False
    if any(str(name) not in TOKENS and not str(name).startswith(PREFERRED) for name in item):
        return False
    tokens, labels, mask = (item.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not (isinstance(tokens, Tensor) and isinstance(labels, Tensor) and tokens.shape == labels.shape):
        return False
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape == tokens.shape and not bool((labels[mask == 0] != IGNORED).any())


def keys_of(batch: Mapping[str, Any]) -> Tensor:
    """A hash of each item's tokens up to the last that counts, and of which count, int64, shape (items,).

    Raises:
        DataError: the batch has no tokens.
    """
    tokens, labels, mask = batch.get("input_ids"), batch["labels"], batch.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.shape != labels.shape:
        raise DataError("forget: a reference tells items by their 'input_ids', which must have the shape of 'labels'")
    kept = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        kept = kept & (mask != 0)
    place = kept.cumsum(1) * _signed(STRIDE)
    each = _mixed(_mixed(tokens.long() + place) ^ labels.long())
    return _mixed(torch.where(kept, each, 0).sum(1) + kept.sum(1))


def find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each wanted key among ascending ones, and whether it is there, both of the shape of `wanted`."""
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return place, keys[place] == wanted


def check_known(found: Tensor, what: str) -> None:
    """Refuse a batch with items that were not there when something was made; a GPU is not waited for.

    Raises:
        DataError: one was not.
    """
    if found.device.type == "cpu" and not bool(found.all()):
        raise DataError(
            f"forget: items {(~found).nonzero().flatten().tolist()} of a batch were not seen when the {what} was made; "
            "items must be the same each time they are read, without random changes, and be part of the forget data "
            "that were given"
        )


def _mixed(value: Tensor) -> Tensor:
    """Every bit depends on every bit; integers wrap around."""
    for shift, factor in ROUNDS:
        value = (value ^ _right(value, shift)) * _signed(factor)
    return value ^ _right(value, 31)


def _right(value: Tensor, shift: int) -> Tensor:
    return (value >> shift) & ((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
