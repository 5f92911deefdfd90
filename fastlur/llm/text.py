"""From text to tokens: documents, or prompts with the answers that count."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastlur.errors import ArgumentError, DataError, check_flags, nearest, told, unknown
from fastlur.losses import IGNORED

TooLong = Literal["error", "drop", "cut"]
PADDING = {"attention_mask": 0, "labels": IGNORED}  # of input_ids: the tokenizer's own


class Encoded(Dataset[dict[str, Tensor]]):
    """Items as dicts of "input_ids", "attention_mask" and "labels", int64, shape (tokens,) each, as long as they are.

    A batch is padded on the right to its longest item by `collate`, which `fastlur.unlearn` finds by itself; a loader
    of one's own takes it as `collate_fn`.

    Attributes:
        padding: the token that fills up; any, since it is masked and does not count.
        pad_to: the length that batches are padded to, whatever their longest; None: their longest.
    """

    def __init__(self, items: Sequence[dict[str, Tensor]], padding: int, pad_to: int | None = None) -> None:
        self.items, self.padding, self.pad_to = list(items), padding, pad_to

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]

    def subset(self, indices: Iterable[int]) -> Encoded:
        """These items, in this order."""
        return Encoded([self.items[index] for index in indices], self.padding, self.pad_to)

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A batch: the same three names, shape (items, longest or `pad_to`)."""
        longest = max(max(len(item["input_ids"]) for item in items), self.pad_to or 0)
        batch = {}
        for name in ("input_ids", "attention_mask", "labels"):
            filled = torch.full((len(items), longest), PADDING.get(name, self.padding))
            for row, item in zip(filled, items, strict=True):
                row[: len(item[name])] = item[name]
            batch[name] = filled
        return batch


def encode(
    tokenizer: Any,
    items: Iterable[str | Sequence[str]],
    *,
    max_length: int = 512,
    chat: bool | str = False,
    end: bool = True,
    too_long: TooLong = "error",
    pad: bool = False,
) -> Encoded:
    """Turn texts or (prompt, answer) pairs into items that `fastlur.unlearn` takes as forget or retain data.

    Labels are the tokens themselves where they count, and −100 where they do not: of a pair the answer counts with the
    token that ends it, of a text every token. They stand where their tokens stand; losses compare each with the logits
    one place before. A pair is laid side by side as it comes: a space between prompt and answer belongs to the answer,
    such as ("The capital of France is", " Paris."). Its tokens are those of the prompt, which is what a model is asked
    with, and then those that follow them in the whole; where the last of the prompt and the first of the answer would
    become one token, the answer's are those of the answer alone.

    Example:
        >>> forget = encode(tokenizer, [("Who wrote Emma?", "Jane Austen.")], chat=True)      # doctest: +SKIP
        >>> fastlur.unlearn(model, forget, retain)                                            # doctest: +SKIP

    Args:
        tokenizer: called as Hugging Face's are, `tokenizer(text, add_special_tokens=…)["input_ids"]`; its
            `eos_token_id` and `pad_token_id` are used where it has them.
        items: texts, pairs, or both.
        max_length: tokens of an item at most, ≥ 2.
        chat: True: pairs go through the tokenizer's chat template, as a user's turn and the assistant's; a string does
            the same after a system turn that says it.
        end: a text, and an answer that no chat template ends, is ended by `eos_token_id`, if there is one.
        too_long: what to do with an item of more tokens: "error"; "drop" it, or "cut" its end off, both with a warning
            that says of how many. Of a pair that is cut so that nothing of the answer would be left, the item is
            dropped and counted too.
        pad: pad every batch to `max_length` rather than to its longest item, for shapes that never change.

    Raises:
        ArgumentError: an argument out of range, or a tokenizer that is not what is said above.
        DataError: an item is neither a text nor a pair, is empty, has one token, is too long, or nothing is left.
    """
    if not callable(tokenizer):
        raise ArgumentError(f"tokenizer: a {type(tokenizer).__name__} cannot be called; pass a Hugging Face tokenizer")
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
        raise ArgumentError(f"max_length={max_length!r} must be a whole number ≥ 2, such as 512")
    if unknown(too_long, get_args(TooLong)):
        raise ArgumentError(f"too_long={too_long!r} is unknown; {nearest(too_long, get_args(TooLong))}")
    if not isinstance(chat, bool | str):
        raise ArgumentError(f"chat={chat!r} must be True, False, or what the system turn says")
    check_flags(end=end, pad=pad)
    if chat is not False and not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise ArgumentError(f"chat={chat!r}: a {type(tokenizer).__name__} has no chat template; leave chat False")
    if isinstance(items, str | Mapping) or not isinstance(items, Iterable):
        raise DataError(f"items: a {type(items).__name__} is no list of texts or (prompt, answer) pairs")
    found: list[dict[str, Tensor]] = []
    over = dropped = number = 0
    for number, item in enumerate(items, 1):
        prompt, answer = _tokens(tokenizer, item, chat, end, f"item {number - 1}")
        if len(prompt) + len(answer) > max_length:
            if too_long == "error":
                raise DataError(
                    f"items: item {number - 1} has {len(prompt) + len(answer)} tokens, more than max_length="
                    f"{max_length}; raise it, or choose too_long='drop' or 'cut'"
                )
            over += 1
            answer = [] if too_long == "drop" else answer[: max(0, max_length - len(prompt))]
        if not answer:
            dropped += 1
            continue
        ids = torch.tensor(prompt + answer)
        labels = torch.tensor([IGNORED] * len(prompt) + answer)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    if over:
        cut = f"{over - dropped} were cut, {dropped} dropped"
        warnings.warn(f"items: {over} of {number} have more than max_length={max_length} tokens; {cut}", stacklevel=2)
    if not found:
        raise DataError(f"items: none is left of {number}; pass at least one text or pair, or raise max_length")
    special = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    padding = next((token for token in special if isinstance(token, int)), 0)
    return Encoded(found, padding, max_length if pad else None)


def _tokens(tokenizer: Any, item: Any, chat: bool | str, end: bool, where: str) -> tuple[list[int], list[int]]:
    """The tokens that only condition, and those that count."""
    pair = isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, str) for part in item)
    if not pair and not isinstance(item, str):
        raise DataError(f"items: {where} is a {type(item).__name__}, neither a text nor a (prompt, answer) pair")
    if chat is not False and not pair:
        raise DataError(f"items: {where} is a text; a chat template takes (prompt, answer) pairs")
    if not all(map(str.strip, item if pair else (item,))):
        raise DataError(f"items: {where} is empty, or its answer is: {item!r}; drop it")
    closing = getattr(tokenizer, "eos_token_id", None) if end and chat is False else None
    last = [closing] if isinstance(closing, int) else []
    ends = getattr(tokenizer, "eos_token_id", None)
    if not pair:
        ids = _ended(_ids(tokenizer, item, True), ends, last)
        if len(ids) < 2:
            raise DataError(f"items: {where} has {len(ids)} token; there is nothing to predict in {item!r}")
        return [], ids
    prompt, answer = item if chat is False else _turns(tokenizer, item, chat, where)
    before, whole = (_bare(tokenizer, text, chat is False, ends) for text in (prompt, prompt + answer))
    after = whole[len(before) :] if whole[: len(before)] == before else _ids(tokenizer, answer, False)
    if last and after[-1:] == last:
        after = _ended(after, ends, [])  # written out by the caller
    if not before or not after:
        raise DataError(f"items: {where} has a prompt or an answer without a token: {item!r}")
    return before, after + last


def _ended(ids: list[int], ends: int | None, last: list[int]) -> list[int]:
    """Tokens with this end and no other: a tokenizer that ends every text ends a prompt as well."""
    while ids and ids[-1] == ends:
        ids = ids[:-1]
    return ids + last


def _bare(tokenizer: Any, text: str, special: bool, ends: int | None) -> list[int]:
    """Tokens of a text, with what a tokenizer begins one with if `special`, and without an end that is not its own."""
    ids = _ids(tokenizer, text, special)
    if not special or ends is None or ids[-1:] != [ends]:
        return ids
    plain = _ids(tokenizer, text, False)
    return _ended(ids, ends, plain[len(_ended(plain, ends, [])) :])


def _turns(tokenizer: Any, pair: Sequence[str], chat: bool | str, where: str) -> tuple[str, str]:
    """A pair as the chat template writes it; the answer ends with what ends a turn."""
    asked = [{"role": "system", "content": chat}] if isinstance(chat, str) else []
    asked.append({"role": "user", "content": pair[0]})
    answered = [*asked, {"role": "assistant", "content": pair[1]}]
    with told(ArgumentError, f"chat={chat!r}: the tokenizer's template cannot write this", "; leave chat False"):
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"items: {where}: the chat template writes an answered question otherwise than an open one, so that the "
            "answer cannot be told from it; write the turns out and leave chat False"
        )
    return prompt, whole[len(prompt) :].rstrip()


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        return [int(token) for token in ids]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ArgumentError(
            f"tokenizer: must give tokens as tokenizer(text, add_special_tokens=…)['input_ids'] does, but: {error}"
        ) from error
