"""Small language models and text for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

WORDS = 37


def llama(attention: str = "sdpa", tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64):
    """A Llama of two layers; the extra must be there."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=WORDS, num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation=attention, **sizes
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def text(items: int, seed: int = 0, length: int = 9, prompt: int = 3) -> dict[str, Tensor]:
    """Prompts with answers, of different lengths, padded; only answers count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (items, length), generator=generator)
    lengths = torch.randint(prompt + 2, length + 1, (items, 1), generator=generator)
    place = torch.arange(length)
    mask = (place < lengths).long()
    labels = torch.where((place >= prompt) & (mask > 0), ids, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class Gpt(nn.Module):
    """A causal language model that nobody knows: it says nothing of itself and takes a dict's names."""

    def __init__(self, words: int = WORDS, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, words)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(self.mix(self.embed(input_ids))[0])
