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


class Words:
    """A tokenizer with the interface and nothing else: a number a word, 1 begins a text, 2 ends an answer."""

    eos_token_id, pad_token_id = 2, 0

    def __init__(self, ends=False):
        self.known = {}
        self.ends = ends

    def __call__(self, text, add_special_tokens=True):
        ids = [self.known.setdefault(word, len(self.known) + 3) for word in text.split()]
        special = [1] if add_special_tokens else []
        return {"input_ids": special + ids + ([2] if self.ends and add_special_tokens else [])}

    def apply_chat_template(self, turns, tokenize=True, add_generation_prompt=False):
        assert not tokenize
        text = "".join(f"<{turn['role']}> {turn['content']} <over>\n" for turn in turns)
        return text + ("<assistant> " if add_generation_prompt else "")

    def read(self, ids):
        names = {number: word for word, number in self.known.items()} | {1: "BEGIN", 2: "END"}
        return [names[int(token)] for token in ids]
