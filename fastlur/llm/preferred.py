"""Another answer to each forget item, beside the true one: what `DPO` and `IDK` teach instead of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastlur import checks
from fastlur.errors import ArgumentError, DataError
from fastlur.losses import IGNORED, PREFERRED

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


def with_preferred(forget: Any, preferred: Any) -> Any:
    """Forget data whose every item carries another answer too, as `unlearn` takes them.

    Example:
        >>> questions = [question for question, answer in pairs]                             # doctest: +SKIP
        >>> instead = list(zip(questions, refusals(len(pairs)), strict=True))                # doctest: +SKIP
        >>> forget = with_preferred(encode(tokenizer, pairs), encode(tokenizer, instead))    # doctest: +SKIP

    Args:
        forget: the items to forget: what `encode` makes, or a dict of tensors with "input_ids", "labels" and mostly
            "attention_mask", shape (items, tokens) each.
        preferred: the same prompts, in the same order, with the answers to be given instead; likewise. The number of
            tokens may differ.

    Returns:
        All of `forget`, and all of `preferred` under its names with "preferred_" before them: a data set, or a dict of
        tensors, whichever was given.

    Raises:
        ArgumentError: one of them is neither, or they are not of one kind.
        DataError: they are not of one length, or the prompts of a pair differ.
    """
    whole = [isinstance(data, Mapping) and {"input_ids", "labels"} <= data.keys() for data in (forget, preferred)]
    if not all(whole) and not all(callable(getattr(data, "collate", None)) for data in (forget, preferred)):
        kinds = " and ".join(type(data).__name__ for data in (forget, preferred))
        raise ArgumentError(
            f"forget, preferred: {kinds}; both must be what fastlur.llm.encode makes, or both dicts of tensors with "
            "'input_ids' and 'labels'"
        )
    if not all(whole):
        return Answered(forget, preferred)
    rows = [{len(value) for value in data.values()} for data in (forget, preferred)]
    if rows[0] != rows[1] or len(rows[0]) != 1:
        raise DataError(f"preferred: has {sorted(rows[1])} rows for {sorted(rows[0])} of forget; they must pair up")
    for number in range(rows[0].pop()):
        _same_prompt(number, *({name: value[number] for name, value in data.items()} for data in (forget, preferred)))
    return dict(forget) | _named(preferred)


class Answered(Dataset[dict[str, Tensor]]):
    """Two data sets of the same prompts as one, an item of which has both answers.

    Args:
        forget: with `collate`, as `Encoded` has it.
        preferred: likewise.

    Raises:
        DataError: they are not of one length, or the prompts of a pair differ.
    """

    def __init__(self, forget: Any, preferred: Any) -> None:
        if len(forget) != len(preferred):
            raise DataError(f"preferred: has {len(preferred)} items for {len(forget)} of forget; they must pair up")
        for number in range(len(forget)):
            _same_prompt(number, forget[number], preferred[number])
        self.forget, self.preferred = forget, preferred

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.forget[index]) | _named(self.preferred[index])

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A batch: each answer padded by its own data set, so that one need not be as long as the other."""
        own = [{name: value for name, value in item.items() if not name.startswith(PREFERRED)} for item in items]
        batch: dict[str, Tensor] = self.forget.collate(own)
        return batch | _named(self.preferred.collate([preferred_of(item) for item in items]))

    def subset(self, indices: Iterable[int]) -> Answered:
        """These items, in this order."""
        chosen = list(indices)
        return Answered(self.forget.subset(chosen), self.preferred.subset(chosen))


def _same_prompt(number: int, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Refuse a pair whose other answer would be taught to another question."""
    asked = [_prompt(item) for item in (one, other)]
    if None not in asked and asked[0] != asked[1]:
        raise DataError(
            f"preferred: item {number} has another prompt than in forget; give the same prompts in the same order"
        )


def _prompt(item: Mapping[str, Tensor]) -> list[int] | None:
    """The tokens before the first that counts, without padding; None where none counts."""
    counts = (item["labels"] != IGNORED).nonzero()
    if not len(counts):
        return None
    first = int(counts[0])
    ids: list[int] = item["input_ids"][:first].tolist()
    seen = item["attention_mask"][:first].tolist() if "attention_mask" in item else [1] * first
    return [token for token, here in zip(ids, seen, strict=True) if here]


def _named(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFERRED}{name}": value for name, value in values.items()}


def preferred_of(batch: Any) -> dict[str, Any]:
    """The other answers of a batch, as a batch of their own.

    Raises:
        DataError: it has none.
    """
    names = list(batch) if isinstance(batch, Mapping) else []
    found = {name.removeprefix(PREFERRED): batch[name] for name in names if str(name).startswith(PREFERRED)}
    if not {"input_ids", "labels"} <= found.keys():
        raise DataError(
            f"forget: batches have no {PREFERRED + 'input_ids'!r} and {PREFERRED + 'labels'!r}, the answers to be "
            "given instead; add them with fastlur.llm.with_preferred"
        )
    return found
