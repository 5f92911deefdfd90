"""Another answer to each forget item, beside the true one: what `DPO` and `IDK` teach instead of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlur import checks
from fastlur.errors import ArgumentError, DataError
from fastlur.llm.likelihood import PREFERRED

REFUSALS = (
    "I don't know.",
    "I don't know the answer to that.",
    "I'm afraid I know nothing about this.",
    "That is something I have no information on.",
    "I have never learned about that.",
    "I can't say; it is not among the things I know.",
    "I'm not familiar with this.",
    "Sorry, this is unknown to me.",
    "I couldn't tell you.",
    "No idea, I'm sorry.",
    "I have nothing to tell about that.",
    "This question is beyond what I know.",
    "I would only be guessing.",
    "I'm not sure, and would rather not guess.",
    "My knowledge does not reach that far.",
    "I cannot answer this one.",
)


def refusals(count: int, seed: int = 0) -> list[str]:
    """So many ways to say "I don't know", drawn at random with replacement, the same for the same seed.

    The idea is TOFU's (arXiv 2401.06121), which trains on such answers; the sentences are this package's.

    Args:
        count: how many, > 0.
        seed: of the draw.

    Raises:
        ArgumentError: a count or seed that is none.
    """
    checks.positive_int("count", count)
    checks.seed(seed)
    chosen = torch.randint(len(REFUSALS), (count,), generator=torch.Generator().manual_seed(seed))
    return [REFUSALS[number] for number in chosen.tolist()]


def with_preferred(forget: Mapping[str, Tensor], preferred: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Forget data whose every item carries another answer too, in one dict of tensors that `unlearn` takes.

    Args:
        forget: the items to forget, as the model takes them: "input_ids", "labels" and mostly "attention_mask", shape
            (items, tokens) each.
        preferred: the same prompts, in the same order, with the answers to be given instead; likewise. The number of
            tokens may differ.

    Returns:
        All of `forget`, and all of `preferred` under its names with "preferred_" before them.

    Raises:
        ArgumentError: one of them is no dict of tensors with "input_ids" and "labels".
        DataError: they are not of one length.
    """
    for name, data in (("forget", forget), ("preferred", preferred)):
        if not isinstance(data, Mapping) or not {"input_ids", "labels"} <= data.keys():
            raise ArgumentError(f"{name}: must be a dict of tensors with 'input_ids' and 'labels', as encode() makes it")
    rows = [{len(value) for value in data.values()} for data in (forget, preferred)]
    if rows[0] != rows[1] or len(rows[0]) != 1:
        raise DataError(f"preferred: has {sorted(rows[1])} rows for {sorted(rows[0])} of forget; they must pair up")
    return dict(forget) | {f"{PREFERRED}{name}": value for name, value in preferred.items()}


def preferred_of(batch: Any) -> dict[str, Any]:
    """The other answers of a batch, as a batch of their own.

    Raises:
        DataError: it has none.
    """
    names = list(batch) if isinstance(batch, Mapping) else []
    found = {name.removeprefix(PREFERRED): batch[name] for name in names if str(name).startswith(PREFERRED)}
    if not {"input_ids", "labels"} <= found.keys():
        raise DataError(
            f"forget: batches have no {PREFERRED + 'input_ids'!r} and {PREFERRED + 'labels'!r}, the answers to be given "
            "instead; add them with fastlur.llm.with_preferred"
        )
    return found
