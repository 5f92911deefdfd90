"""The data of a run before it begins: as sources, what they hold, how they come, and how many steps they make."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastlur import checks, content, identity
from fastlur.data import Indexed, Source, Stream, source, to_device
from fastlur.errors import ArgumentError, DataError, told
from fastlur.losses import TARGETS, is_text, split
from fastlur.passes import ARGUMENT, Which
from fastlur.slots import Selection, select
from fastlur.task import CAUSAL, CLASSIFICATION, of_model
from fastlur.world import borrowed_random, derive, seed_loading

STEPS = 150
TASKS = ("auto", CLASSIFICATION, CAUSAL)
PROBES = 8  # retain batches that a retain budget is measured on
SIDES: tuple[Which, Which] = ("forget", "retain")
Looked = tuple[dict[Which, Source], dict[Which, content.Content], dict[Which, Any]]


def look_at_data(forget: Any, retain: Any, batch_size: int, seed: int, device: torch.device) -> Looked:
    """Both sides as sources, what they hold, and the first batch of each.

    Raises:
        DataError: they cannot be read, are empty, not finite or nothing known.
    """
    sources: dict[Which, Source] = {}
    contents: dict[Which, content.Content] = {}
    firsts: dict[Which, Any] = {}
    with borrowed_random(device):
        for side, data in zip(SIDES, (forget, retain), strict=True):
            with told(DataError, f"{side}: cannot be read"):
                sources[side] = source(data, side, batch_size)
                contents[side] = content.read(sources[side], side, derive(seed, "look", side))
                with closing(Stream(sources[side], derive(seed, side))) as stream:
                    firsts[side] = next(stream)
    return sources, contents, firsts


def task_of(task: str, model: nn.Module, batches: dict[Which, Any], read: Collection[Which], method: Any) -> str:
    """The task; where it is "auto" what the model says of itself (see `fastlur.task`), or else the batches.

    Args:
        task: as `unlearn` takes it.
        model: the model.
        batches: the first of each side.
        read: the sides that a loss of the task's own is for.
        method: asked whether it can be used for it.

    Raises:
        ArgumentError: unknown, not to be told from the batches, or none of the method's.
    """
    checks.one_of("task", task, TASKS)
    found = of_model(model) if task == "auto" else task
    if found is None:
        found = CAUSAL if any(map(is_text, batches.values())) else CLASSIFICATION
    for side in read:
        targets = split(batches[side])[1]
        if task == "auto" and not (isinstance(targets, Tensor) and not targets.is_floating_point()):
            raise ArgumentError(
                f"task='auto': {side} batches do not look like classification or text ((inputs, integer targets) or a "
                f"dict with {TARGETS[0]!r}); pass loss= and forget_loss="
            )
    known = getattr(method, "tasks", (found,))
    if found not in known:
        raise ArgumentError(f"method={method.name!r} is for {', '.join(known)}, not for {found}; choose another")
    return found


def same_run(
    model: nn.Module,
    method: object,
    losses: dict[Which, Any],
    rules: Sequence[Any],
    optimizer: str | torch.optim.Optimizer,
    parameters: Selection,
    sources: dict[Which, Source],
    contents: dict[Which, content.Content],
    held: dict[str, str],
) -> dict[str, Any]:
    """What a run must have in common with the one that it continues, beside its settings; plain values.

    `held` are the settings of the model before its first forward: what that has changed is a note and no setting.
    """
    same: dict[str, Any] = {f"{side} data": contents[side].digest for side in SIDES}
    same |= {f"{side} batches": batching(sources[side], contents[side]) for side in SIDES}
    same |= {f"what {ARGUMENT[side]} does": identity.fingerprint(each) for side, each in losses.items()}
    same |= {"model": identity.model_digest(model), "architecture": identity.architecture_digest(model)}
    noted = identity.model_settings(model)
    same[identity.SETTINGS] = {name: value for name, value in held.items() if noted.get(name) == value}
    same["stop"] = [identity.shown(rule) for rule in rules]
    same["optimizer's parameters"] = identity.optimizer_parameters(optimizer, model)
    same["code of the method"] = identity.code_of(method)
    same["moving parameters"] = list(dict.fromkeys(name for name, _ in select(model, parameters)))
    return same


def here(device: torch.device) -> dict[str, Any]:
    """What the bits of a result depend on beside the call: a difference is warned of, and the run goes on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "threads": torch.get_num_threads(),
        "device name": name,
        "precision of matrix products": torch.get_float32_matmul_precision(),
    }


def warn_of_unread(contents: dict[Which, content.Content]) -> None:
    """Warn that a resumed run cannot know whether all data are the same."""
    for side in SIDES:
        if contents[side].left_out:
            warnings.warn(
                f"checkpoint: {contents[side].left_out} {side} items are not looked at, since they may have to be "
                "decoded; a change among them would not be noticed when the run goes on",
                stacklevel=3,
            )


def batching(found: Source, what: content.Content) -> dict[str, Any]:
    """How the data come in batches, as far as the caller decides it: plain values, the same in another process."""
    told: dict[str, Any] = {"batches": found.per_epoch}
    loader = getattr(found, "batches", None)
    if not isinstance(loader, DataLoader):
        return told | {"sizes": what.sizes}
    samplers = loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)
    return told | {
        "sizes": what.sizes,
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "workers": loader.num_workers,
        "samplers": [identity.fingerprint(each, (Dataset,)) for each in samplers],  # the data are compared
        "collate": identity.fingerprint(loader.collate_fn),
    }


def probes(
    retain: Source, seed: int, device: torch.device, memory_format: torch.memory_format | None
) -> list[tuple[Any, int]]:
    """The fixed retain batches that a retain budget is measured on, drawn at random, and how many items each has."""
    with borrowed_random(device):
        drawn = _drawn(retain, derive(seed, "budget"))
        return [(to_device(batch, device, memory_format), content.rows(batch)) for batch in drawn]


def _drawn(retain: Source, seed: int) -> Iterator[Any]:
    """Some batches of one pass, no item twice; where only iterating tells what the items are, the pass is read."""
    seed_loading(seed)
    if isinstance(retain, Indexed):
        order = torch.randperm(retain.length)[: PROBES * retain.batch_size]
        seed_loading(seed)
        yield from map(retain.take, torch.split(order, retain.batch_size))
        return
    loader: Any = getattr(retain, "batches", None)
    served = content.loader_indices(loader) if _batched(loader) else None
    if served is not None:
        size = loader.batch_size
        some = random.Random(seed).sample(served, min(len(served), PROBES * size))
        for begin in range(0, len(some), size):
            yield loader.collate_fn([loader.dataset[index] for index in some[begin : begin + size]])
        return
    chosen: list[Any] = []
    choice = random.Random(seed)
    for number, batch in enumerate(retain.once(seed)):  # each has the same chance, however many there are
        place = number if number < PROBES else choice.randrange(number + 1)
        chosen[place : place + 1] = [batch] if place < PROBES else chosen[place : place + 1]
    yield from chosen


def _batched(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.batch_sampler is not None


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
