"""From questions and answers to batches of tokens, and a tokenizer of whole words for the tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlur.losses import IGNORED

PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"
WORD = r"\w+|[^\w\s]"


@dataclass(frozen=True)
class Reader:
    """A tokenizer of transformers, and how a question is put before the model.

    Attributes:
        tokenizer: with an end-of-sequence token.
        prompt: where the question stands in it, "{}".
        gap: between that and the answer.
    """

    tokenizer: Any
    prompt: str = "Question: {}\nAnswer:"
    gap: str = " "

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """The token that fills up; nothing ever looks at it."""
        return self.end if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)

    def asked(self, question: str) -> list[int]:
        """The tokens of a prompt."""
        return self._ids(self.prompt.format(question))

    def said(self, answer: str) -> list[int]:
        """The tokens of an answer, without the end's."""
        return self._ids(self.gap + answer)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def encoded(reader: Reader, asked: Sequence[tuple[str, str]], end: bool = True) -> dict[str, Tensor]:
    """Prompts with their answers, padded on the right; labels are −100 but for the answer.

    Args:
        reader: of the model.
        asked: (question, answer) pairs.
        end: let the end-of-sequence token follow the answer and count.

    Returns:
        "input_ids", "attention_mask" and "labels", each of shape (pairs, tokens).
    """
    rows = []
    for question, answer in asked:
        rows.append((reader.asked(question), reader.said(answer) + [reader.end] * end))
    longest = max(len(prompt) + len(said) for prompt, said in rows)
    ids, mask, labels = [], [], []
    for prompt, said in rows:
        size = len(prompt) + len(said)
        rest = longest - size
        ids.append(prompt + said + [reader.pad] * rest)
        mask.append([1] * size + [0] * rest)
        labels.append([IGNORED] * len(prompt) + said + [IGNORED] * rest)
    return {
        name: torch.tensor(each) for name, each in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


def answer_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where an answer stands and nowhere else: with 49,152 words, the others are a fifth of a pass.

    Args:
        model: a causal language model of transformers.
        batch: as `encoded` makes it.

    Returns:
        Logits, shape (tokens that count, words), the tokens that they speak of, shape (tokens that count,), and which
        item each belongs to, likewise.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    hidden = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    following = batch["labels"][:, 1:]
    counts = following != IGNORED
    return head(hidden[:, :-1][counts]), following[counts], counts.nonzero()[:, 0]


def prompts(reader: Reader, questions: Sequence[str]) -> dict[str, Tensor]:
    """Prompts padded on the left, so that all go on at the same place: "input_ids" and "attention_mask"."""
    rows = [reader.asked(question) for question in questions]
    longest = max(map(len, rows))
    ids = torch.tensor([[reader.pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def generated(model: Any, reader: Reader, questions: Sequence[str], most: int = 32, batch_size: int = 33) -> list[str]:
    """The greedy answer to every question, of at most so many tokens; the model's mode comes back as it was."""
    training, found = model.training, list[str]()
    model.eval()
    try:
        for at in range(0, len(questions), batch_size):
            found += _greedy(model, reader, questions[at : at + batch_size], most)
    finally:
        model.train(training)
    return found


def _greedy(model: Any, reader: Reader, questions: Sequence[str], most: int) -> list[str]:
    batch, cache, end = prompts(reader, questions), None, reader.end
    ids, mask = batch["input_ids"], batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    done, said = torch.zeros(len(ids), dtype=torch.bool), list[Tensor]()
    for _ in range(most):
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        token = torch.where(done, end, out.logits[:, -1].argmax(-1))
        said.append(token)
        done |= token == end
        if bool(done.all()):
            break
        cache, ids, places = out.past_key_values, token[:, None], places[:, -1:] + 1
        mask = torch.cat((mask, torch.ones(len(mask), 1, dtype=mask.dtype)), 1)
    rows = torch.stack(said, 1).tolist()
    return [reader.tokenizer.decode(row[: row.index(end)] if end in row else row).strip() for row in rows]


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation: what ROUGE counts."""
    return re.findall(r"[a-z0-9]+", text.lower())


def word_tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer of transformers whose tokens are the words and signs of some texts, made in memory."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = sorted({word for text in texts for word in re.findall(WORD, text)})
    vocabulary = {word: number for number, word in enumerate((PAD, END, UNKNOWN, *known))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(WORD), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)
