"""Answers drawn from a causal language model, one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlur.losses import logits_in, wide


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    end: int | None = None,
    masked: bool = True,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Rows stand to the left, padded on the right, and the model runs over all of them for every token: what it takes is
    an ordinary forward, whatever the model, at the price of no cache.

    Args:
        model: called with "input_ids" and, if `masked`, "attention_mask"; in the mode it is in.
        prompts: their tokens, at least one each.
        tokens: how many to draw at most, > 0.
        temperature: > 0; divides the logits.
        top_p: in (0, 1]; only the likeliest tokens that together have this probability are drawn from.
        end: the token that ends an answer, which is part of it; None: none does.
        masked: whether the model takes an attention mask.
        device: where the model is; None: the CPU.
        generator: what to draw with, on that device; None: the global one.

    Returns:
        The tokens drawn for each prompt, up to `tokens` of them.
    """
    longest = max(map(len, prompts))
    rows = torch.zeros(len(prompts), longest + tokens, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows = rows.to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
    begun, going = lengths.clone(), torch.ones_like(lengths, dtype=torch.bool)
    places, each = torch.arange(rows.shape[1], device=rows.device), torch.arange(len(prompts), device=rows.device)
    for number in range(tokens):
        now = rows[:, : longest + number]
        mask = {"attention_mask": (places[: now.shape[1]] < lengths[:, None]).long()} if masked else {}
        logits = logits_in(model(input_ids=now, **mask), now.shape)[each, lengths - 1]
        drawn = torch.multinomial(_probabilities(logits, temperature, top_p), 1, generator=generator).squeeze(1)
        rows[each, lengths] = torch.where(going, drawn, rows[each, lengths])
        lengths = lengths + going.long()
        if end is not None:
            going = going & (drawn != end)
            if not bool(going.any()):
                break
    spans = zip(rows.tolist(), begun.tolist(), lengths.tolist(), strict=True)
    return [row[first:last] for row, first, last in spans]


def _probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    found = torch.softmax(wide(logits) / temperature, dim=-1)
    if top_p < 1:
        ordered, places = found.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(-1) - ordered  # the probability of those before
        found = torch.zeros_like(found).scatter(-1, places, torch.where(likelier < top_p, ordered, 0.0))
    return found
