"""A causal language model of a few hundred weights, texts for it, and what its answers are worth item by item."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlur

F64 = torch.float64
WORDS = 13


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.mix, self.up, self.down = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.first, self.second, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor]:
        q, k, v = self.mix(self.first(x)).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~seen, -1e9)
        x = x + self.drop(scores.softmax(-1) @ v)
        return (x + self.drop(self.down(torch.tanh(self.up(self.second(x))))),)


class TinyLM(nn.Module):
    """Positions are counted from the first token that is not padding."""

    def __init__(self, width: int = 8, blocks: int = 2, dropout: float = 0.0, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(WORDS, width), nn.Embedding(32, width)
        self.layers = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, WORDS)
        self.to(dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids) + self.place((mask.cumsum(1) - 1).clamp(min=0))
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        seen = causal & (mask[:, None, :] != 0)
        for block in self.layers:
            (x,) = block(x, seen)
        return self.out(self.norm(x))


def texts(count: int, prompt: int = 3, longest: int = 8, seed: int = 0, asked: int | None = None) -> dict[str, Tensor]:
    """Items with prompts of `prompt` tokens and answers of one token and more, padded on the right with token 0.

    With `asked` the prompts are those of the texts with that seed, and only the answers are others.
    """
    draw = torch.Generator().manual_seed(seed)
    lengths = prompt + 1 + torch.arange(count) % (longest - prompt)
    ids = torch.randint(1, WORDS, (count, longest), generator=draw)
    if asked is not None:
        ids[:, :prompt] = texts(count, prompt, seed=asked)["input_ids"][:, :prompt]
    mask = (torch.arange(longest) < lengths[:, None]).long()
    counts = mask.bool() & (torch.arange(longest) >= prompt)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(counts, ids, -100)}


def to_the_left(batch: dict[str, Tensor], more: int = 0) -> dict[str, Tensor]:
    """The same items, padded on the left, with some padding more."""
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    moved = {name: torch.full((len(value), value.shape[1] + more), fill[name]) for name, value in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for name, value in batch.items():
            moved[name][row, -length:] = value[row, :length]
    return moved


def padded(batch: dict[str, Tensor], more: int) -> dict[str, Tensor]:
    """The same items with some padding more on the right, of another token."""
    fill = {"input_ids": 5, "attention_mask": 0, "labels": -100}
    return {name: functional.pad(value, (0, more), value=fill[name]) for name, value in batch.items()}


def rows(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each item without its padding."""
    masks = batch["attention_mask"].bool()
    return [(ids[m], labels[m]) for ids, labels, m in zip(batch["input_ids"], batch["labels"], masks, strict=True)]


def answers(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p(answer | prompt) and its number of tokens, item by item and token by token."""
    found, counts = [], []
    for ids, labels in rows(batch):
        p = model(ids[None]).softmax(-1)[0]
        places = [i for i in range(1, len(ids)) if labels[i] != -100]
        found.append(sum(p[i - 1, labels[i]].log() for i in places))
        counts.append(len(places))
    return torch.stack(found), torch.tensor(counts)


def learned(*sets, steps=250):
    """A model that knows the answers of these sets."""
    torch.manual_seed(0)
    model = TinyLM(width=16)
    batch = {name: torch.cat([each[name] for each in sets]) for name in sets[0]}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(fastlur.llm.causal_cross_entropy(model, batch))
        optimizer.step()
    return model
