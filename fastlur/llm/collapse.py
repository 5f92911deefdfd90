"""Partial Model Collapse: a forget prompt is answered by what the model itself says that is least like the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlur import checks
from fastlur.errors import ArgumentError, DataError
from fastlur.llm.likelihood import causal_cross_entropy
from fastlur.llm.sampling import sample
from fastlur.losses import IGNORED
from fastlur.methods.base import check_range
from fastlur.microbatch import MicroBatches, alike
from fastlur.passes import Passes
from fastlur.statistics import Statistics
from fastlur.texts import keys_of
from fastlur.world import derive, mode

Reward = Callable[[Sequence[int], Sequence[int]], float]


def unlikeness(answer: Sequence[int], true: Sequence[int]) -> float:
    """1 − the share of the true answer's tokens that stand in the answer in the same order, in [0, 1].

    That share is the recall of ROUGE-L, over tokens instead of words.
    """
    if not true:
        return 1.0
    row = [0] * (len(true) + 1)
    for token in answer:
        before = 0
        for place, other in enumerate(true, 1):
            above = row[place]
            row[place] = before + 1 if token == other else max(above, row[place - 1])
            before = above
    return 1.0 - row[-1] / len(true)


@dataclass(frozen=True)
class Collapse:
    """Mean cross-entropy, in nats a token, of answers that the model itself has drawn, shape ().

    To every prompt of the batch the model as it is draws a few answers, and the one that a reward likes best, by
    default the one least like the true answer, is trained on. The true answer itself is never in the gradient; what is
    drawn is likely anyway, so the model leaves its old answer in small steps.

    In a run answers are drawn once a step, at the first pass over the batch, and stand for its other passes. What is
    drawn depends on the seed, the step and the weights alone, so that a resumed run draws the same. Drawing takes
    `tokens` forwards of `samples` times the batch, without a cache, and waits for the device, unlike other losses.

    Source: Partial Model Collapse, arXiv 2507.04219, with the sampling (5 answers at temperature 1.25, top-p 0.95) and
    the choice as in the authors' code. There the comparison is with what the model answered before unlearning, word by
    word, here with the labels, token by token; and there the best answer of all steps is kept for every item, here that
    of the step.

    Args:
        end: the token that ends an answer (`tokenizer.eos_token_id`); None: answers all have `tokens` tokens.
        samples: answers a prompt, > 0.
        tokens: of an answer at most, > 0.
        temperature: > 0.
        top_p: in (0, 1].
        shortest: an answer of fewer tokens, its end aside, is taken only if all are shorter: to say nothing at all is
            least like anything.
        reward: `(answer's tokens, true answer's tokens) -> float`, without their ends; None: `unlikeness`.

    Raises:
        ArgumentError: a value out of range. DataError, when called: a batch that is no text, or has no prompt.
    """

    end: int | None = None
    samples: int = 5
    tokens: int = 64
    temperature: float = 1.25
    top_p: float = 0.95
    shortest: int = 1
    reward: Reward | None = None

    def __post_init__(self) -> None:
        checks.positive_ints(samples=self.samples, tokens=self.tokens)
        check_range("temperature", self.temperature, low=1e-6, example=1.25)
        check_range("top_p", self.top_p, low=1e-6, high=1, example=0.95)
        for name in ("end", "shortest"):
            value = getattr(self, name)
            if not (value is None and name == "end") and (not isinstance(value, int) or value is True or value < 0):
                raise ArgumentError(f"{name}={value!r} must be a whole number ≥ 0")
        if self.reward is not None and not callable(self.reward):
            raise ArgumentError(
                f"reward: a {type(self.reward).__name__} cannot be called; pass (answer, true) -> float"
            )

    def prepare(self, passes: Passes) -> Drawn:
        """With draws of its own in every step."""
        return Drawn(self, passes)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """On answers drawn now, with torch's global generator."""
        return causal_cross_entropy(model, self.batch(model, batch))

    def batch(self, model: Any, batch: Any, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The prompts of a batch with the answers chosen, padded on the right.

        Args:
            model: what draws, in eval mode.
            batch: prompts and true answers.
            generator: on the batch's device; None: the global one.
        """
        pairs = _pairs(batch)
        device = batch["input_ids"].device
        asked = [prompt for prompt, _ in pairs for _ in range(self.samples)]
        options = {"temperature": self.temperature, "top_p": self.top_p, "end": self.end, "generator": generator}
        masked = "attention_mask" in batch

        def draw() -> list[list[int]]:
            return sample(model, asked, self.tokens, masked=masked, device=device, **options)  # type: ignore[arg-type]

        module = model.module if isinstance(model, MicroBatches) else model
        if isinstance(module, nn.Module):
            with mode(module, False), Statistics(module).frozen():
                drawn = draw()
        else:
            drawn = draw()
        chosen = []
        for number, (prompt, true) in enumerate(pairs):
            answers = drawn[number * self.samples : (number + 1) * self.samples]
            chosen.append((prompt, max(answers, key=partial(self._worth, true))))
        return _batch(chosen, masked, device)

    def _worth(self, true: list[int], answer: list[int]) -> tuple[bool, float]:
        said, meant = ([t for t in each if t != self.end] for each in (answer, true))
        return len(said) >= self.shortest, float((self.reward or unlikeness)(said, meant))


class Drawn:
    """`Collapse` in a run, which draws once a step."""

    def __init__(self, collapse: Collapse, passes: Passes) -> None:
        self.collapse, self._passes = collapse, passes
        self._step = -1
        self._known: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """See `Collapse`."""
        passes = self._passes
        if passes.step != self._step:
            self._step, self._known = passes.step, {}
        key = (*keys_of(batch).tolist(),) if _is_text(batch) else ()
        if key not in self._known:
            generator = torch.Generator(passes.space.device)
            generator.manual_seed(derive(passes.seed, passes.step, "collapse", key))
            self._known[key] = self.collapse.batch(alike(model, passes.space.model), batch, generator)
        return causal_cross_entropy(model, self._known[key])


def _is_text(batch: Any) -> bool:
    return isinstance(batch, Mapping) and all(isinstance(batch.get(n), Tensor) for n in ("input_ids", "labels"))


def _pairs(batch: Any) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt, and those of its true answer."""
    if not _is_text(batch):
        raise DataError("forget: batches of text must be dicts with 'input_ids' and 'labels'; see fastlur.llm.encode")
    tokens, counts = batch["input_ids"], batch["labels"] != IGNORED
    mask = batch.get("attention_mask")
    here = torch.ones_like(counts) if mask is None else mask != 0
    before = here & (counts.cumsum(1) == 0) & counts.any(1, keepdim=True)
    pairs = [
        (row[asked].tolist(), row[meant].tolist()) for row, asked, meant in zip(tokens, before, counts, strict=True)
    ]
    if not all(prompt for prompt, _ in pairs):
        raise DataError("forget: an item has no prompt before its answer, which the model could be asked")
    return pairs


def _batch(pairs: list[tuple[list[int], list[int]]], masked: bool, device: torch.device) -> dict[str, Tensor]:
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens = torch.zeros(len(pairs), longest, dtype=torch.long)
    labels, mask = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    for row, (prompt, answer) in enumerate(pairs):
        whole = torch.tensor(prompt + answer)
        tokens[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    made = {"input_ids": tokens, "labels": labels} | ({"attention_mask": mask} if masked else {})
    return {name: value.to(device) for name, value in made.items()}
