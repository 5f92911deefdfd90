"""How likely a causal language model finds the answers of a batch: what every loss and metric on text is made of.

A batch is a dict of the model's arguments with "labels", shape (items, tokens): the token itself where it counts, −100
where it does not (the prompt, the padding). Logits at one place speak of the token at the next. What stands under names
that begin with "preferred_" is another answer to the same prompts, for losses that compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from fastlur.errors import DataError
from fastlur.losses import IGNORED, PREFERRED, cross_entropy, logits_in, wide
from fastlur.task import CAUSAL, viewed_as


class Likelihood(NamedTuple):
    """Of every item of a batch.

    Attributes:
        log_probs: log p(answer | prompt) in nats, shape (items,): the sum over the tokens that count.
        tokens: how many tokens count, shape (items,), at least 1.
    """

    log_probs: Tensor
    tokens: Tensor


def likelihood(model: Any, batch: Any) -> Likelihood:
    """Run the model once over a batch.

    Raises:
        DataError: the batch or what the model returns is not what the module's docs say.
    """
    logits, targets = shifted(model, batch)
    rows = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return Likelihood(-rows.view_as(targets).sum(1), (targets != IGNORED).sum(1).clamp(min=1))


def causal_cross_entropy(model: Any, batch: Any) -> Tensor:
    """Mean over the tokens that count, in nats, shape (): the default retain loss of language models.

    It is `fastlur.losses.cross_entropy` for text, whatever the model says it is.
    """
    with viewed_as(CAUSAL):
        return cross_entropy(model, batch)


def shifted(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits, shape (items, tokens − 1, words), in float32 at least, and the tokens that they speak of.

    Raises:
        DataError: see `likelihood`.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point() or labels.shape[1] < 2:
        raise DataError(
            "forget/retain: batches of text must be dicts with 'input_ids' and 'labels' of shape (items, tokens), at "
            "least two tokens; see fastlur.llm.encode"
        )
    logits = logits_in(model(**arguments(batch)), labels.shape)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != labels.shape:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"model: returned {shape} for labels of shape {tuple(labels.shape)}; logits are needed")
    return wide(logits[:, :-1]), labels[:, 1:]


def arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model is called with: neither the labels nor another answer."""
    return {name: value for name, value in batch.items() if name != "labels" and not name.startswith(PREFERRED)}
