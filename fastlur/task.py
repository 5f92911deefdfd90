"""What logits speak of: the label that stands beside them, or, in text, the token that comes next.

Labels of a causal language model stand where their tokens stand, and its logits at one place speak of the next one. A
batch of text fits a classifier's loss as well, unshifted, and nothing would tell: the task is therefore part of how a
loss reads a batch, whichever loss it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.nn.parallel import DataParallel, DistributedDataParallel

CLASSIFICATION, CAUSAL = "classification", "causal_lm"
BESIDE = ("xlnet", "xlm", "flaubert")  # generate, but have their labels beside the logits
WRAPPED = 8  # modules around modules that are looked into

_asked: ContextVar[str | None] = ContextVar("fastlur.task", default=None)


@contextmanager
def viewed_as(task: str) -> Iterator[str]:
    """Inside, losses read batches so, whatever the model."""
    token = _asked.set(task)
    try:
        yield task
    finally:
        _asked.reset(token)


def of_model(model: Any) -> str | None:
    """The task that a model is made for; None where it does not say.

    A model of Hugging Face's says: it is a causal language model if it can generate text (or is called …ForCausalLM)
    and is no encoder with a decoder, whose labels are beside its logits. So a token classifier is none, although its
    batches look the same. Adapters, compiled and wrapped models say what the model inside says.
    """
    for _ in range(WRAPPED):
        if not isinstance(model, DataParallel | DistributedDataParallel):
            break
        model = model.module
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", None)
    if config is None or not callable(generates):
        return None
    beside = getattr(config, "is_encoder_decoder", False) or getattr(config, "model_type", None) in BESIDE
    speaks = generates() or type(model).__name__.endswith("ForCausalLM")
    return CAUSAL if speaks and not beside else CLASSIFICATION


def known(model: Any) -> str | None:
    """The task of a loss's model: as `viewed_as` says, or else the model; None where neither does."""
    return _asked.get() or of_model(model)
