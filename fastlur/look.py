"""The data of a run before it begins: as sources, what they hold, and how many steps they make."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch

from fastlur import content
from fastlur.data import Source, Stream, source, to_device
from fastlur.errors import ArgumentError
from fastlur.passes import Which
from fastlur.world import borrowed_random, derive, seed_loading

STEPS = 150
PROBES = 8  # retain batches that a retain budget is measured on
SIDES: tuple[Which, Which] = ("forget", "retain")
Looked = tuple[dict[Which, Source], dict[Which, content.Content], dict[Which, Any]]


def look_at_data(forget: Any, retain: Any, batch_size: int, seed: int, device: torch.device) -> Looked:
    """Both sides as sources, what they hold, and the first batch of each."""
    sources: dict[Which, Source] = {
        "forget": source(forget, "forget", batch_size),
        "retain": source(retain, "retain", batch_size),
    }
    contents: dict[Which, content.Content] = {}
    firsts: dict[Which, Any] = {}
    with borrowed_random(device):
        for side in SIDES:
            contents[side] = content.read(sources[side], side, derive(seed, "look", side))
            stream = Stream(sources[side], derive(seed, side))
            try:
                firsts[side] = next(stream)
            finally:
                stream.close()
    return sources, contents, firsts


def probes(retain: Source, seed: int, device: torch.device, memory_format: torch.memory_format | None) -> list[Any]:
    """The fixed retain batches that a retain budget is measured on."""
    with borrowed_random(device):
        seed_loading(derive(seed, "budget"))
        return [to_device(batch, device, memory_format) for batch in islice(retain.once(), PROBES)]


def length(sources: dict[Which, Source], steps: int | None, epochs: float | None, usual: int | None) -> int:
    """How many steps: as asked for, or what is usual with the method; 0 for a method without steps, always."""
    if usual == 0:
        return 0
    if epochs is None:
        return steps or usual or STEPS
    counts = [source.per_epoch for source in sources.values()]
    if None in counts:
        raise ArgumentError(f"epochs={epochs!r}: the data do not tell their length; give steps= instead")
    return max(1, math.ceil(epochs * max(count for count in counts if count is not None)))
