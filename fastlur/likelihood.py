"""The likelihood-ratio attack on a model: the strongest of the membership attacks here, and by far the dearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from fastlur.attacks import LikelihoodRatio, likelihood_ratio
from fastlur.errors import ArgumentError, DataError
from fastlur.result import Result
from fastlur.scores import scores
from fastlur.world import derive


def likelihood_ratio_attack(
    model: nn.Module | Result,
    data: Any,
    *,
    shadows: Sequence[tuple[nn.Module | Result, ArrayLike]] | None = None,
    train: Callable[[Tensor], nn.Module | Result] | None = None,
    count: int = 8,
    reference: nn.Module | Result | None = None,
    pooled: bool | None = None,
    batch_size: int = 512,
    seed: int = 0,
) -> LikelihoodRatio:
    """Score every item of `data` by how much more the model's answer looks like that of a model trained with it.

    What it costs: `count` trainings from scratch, each as dear as the training of the model attacked (unless shadow
    models are given), and one pass over `data` for each. A few shadows give a rough attack; the publication uses 256.

    Example:
        >>> from torch.utils.data import ConcatDataset, TensorDataset
        >>> audited = tuple(torch.cat(p) for p in zip(forget, test))                        # doctest: +SKIP
        >>> found = fastlur.likelihood_ratio_attack(result, audited, train=train_with, reference=retrained)
        ...                                                                                 # doctest: +SKIP
        >>> members = torch.arange(len(audited[1])) < len(forget[1])                        # doctest: +SKIP
        >>> found.auc(members), found.reference.auc(members)                                # doctest: +SKIP

    After unlearning, ask about the forget items and as many that were never seen: an AUC of ½ says that the model does
    not answer as one that was trained on the former, the reference's AUC what can be expected of one. Items that no
    shadow was trained on are judged "offline", by how unusually sure of them the model is; as soon as one was, all are
    judged "online" and need shadows of both kinds.

    Args:
        model: the one attacked, or the `Result` of `unlearn`; so it is for the other models here.
        data: the items asked about, labelled, in an order of their own (a shuffling loader is refused).
        shadows: pairs of a model trained like the one attacked, and bool, shape (n,): which of the items it saw.
        train: makes such a model, given the indices of the items, shape (m,), int64, that it is to be trained on
            besides whatever else it takes; used where `shadows` is None. Every item goes into half of the shadows.
        count: how many shadows to train, even and ≥ 2.
        reference: a model retrained without the forget items, attacked likewise with the same shadows.
        pooled: see `fastlur.attacks.likelihood_ratio`; None: one variance for all items below 64 shadows.
        batch_size: for data that do not come in batches.
        seed: which items go into which shadow.

    Returns:
        The `LikelihoodRatio`: scores, and what they are worth where the truth is known; with a reference, that of the
        reference is its `reference`.

    Raises:
        ArgumentError: neither or both of `shadows` and `train`, or too few shadows for an item.
        DataError: data that shuffle, or do not fit a model.
    """
    if (shadows is None) == (train is None):
        raise ArgumentError("shadows: give either trained shadow models or train=, a function that makes one")
    if train is not None and not callable(train):
        raise ArgumentError(f"train={train!r} cannot be called; pass indices -> a trained model")
    if pooled is not None and not isinstance(pooled, bool):
        raise ArgumentError(f"pooled={pooled!r} must be True, False or None")
    if shadows is not None and not (isinstance(shadows, list | tuple) and all(map(_is_pair, shadows))):
        raise ArgumentError("shadows: must be a list of pairs of a model and which items it saw, as bools")
    if isinstance(data, DataLoader) and not _in_order(data):
        raise DataError("data: a loader that draws its own order; pass the data set, or a loader with shuffle=False")
    asked = [_said(each, data, batch_size) for each in ([model] if reference is None else [model, reference])]
    if shadows is None:
        shadows = _trained(train, len(asked[0]), count, seed)
    if not shadows:
        raise ArgumentError("shadows=[] is empty; pass at least one model trained without the items")
    said, inside = [], []
    for shadow, seen in shadows:
        said.append(_said(shadow, data, batch_size))
        inside.append(np.asarray(seen, bool))
        if inside[-1].shape != asked[0].shape:
            raise ArgumentError(f"shadows: membership of shape {inside[-1].shape} for {len(asked[0])} items")
    has = np.stack(inside)
    few = len(shadows) < 64 if pooled is None else pooled
    found: LikelihoodRatio | None = None
    for each in reversed(asked):
        ratios = likelihood_ratio(each, np.stack(said), has, pooled=few)
        found = LikelihoodRatio(ratios, online=bool(has.any()), shadows=len(shadows), reference=found)
    assert found is not None
    return found


def _said(model: nn.Module | Result, data: Any, batch_size: int) -> np.ndarray:
    """The log-odds of every item's true class."""
    plain = model.model if isinstance(model, Result) else model
    return scores(plain, data, "data", batch_size).log_odds


def _trained(
    train: Callable[[Tensor], nn.Module | Result] | None, items: int, count: int, seed: int
) -> list[tuple[nn.Module | Result, np.ndarray]]:
    """Shadow models in pairs, one trained on a random half of the items, the other on the rest."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 2 or count % 2:
        raise ArgumentError(f"count={count!r} must be an even whole number ≥ 2: shadows come in complementary pairs")
    assert train is not None
    made = []
    for pair in range(count // 2):
        order = np.random.default_rng(derive(seed, "shadow", pair)).permutation(items)
        for half in (order[: items // 2], order[items // 2 :]):
            seen = np.zeros(items, bool)
            seen[half] = True
            made.append((train(torch.from_numpy(np.flatnonzero(seen))), seen))
    return made


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _in_order(loader: DataLoader[Any]) -> bool:
    batches = loader.batch_sampler
    return isinstance(loader.sampler if batches is None else getattr(batches, "sampler", None), SequentialSampler)
