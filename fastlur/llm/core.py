"""A forget set without its outliers: what forgetting all alike items takes with it is less than what odd ones do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fastlur import checks
from fastlur.data import Feed, source
from fastlur.errors import ArgumentError, DataError
from fastlur.llm.representation import Layer, check_layer, hidden
from fastlur.losses import wide
from fastlur.methods.base import check_range
from fastlur.statistics import Statistics
from fastlur.world import borrowed_random, passing

TREES = 100


@dataclass(frozen=True, eq=False)
class Core:
    """Which items of a forget set are its core.

    Attributes:
        kept: numbers of the items kept, in their order, int64, shape (kept,).
        scores: of every item, shape (items,); the lower, the odder.
        variance_before: of the hidden states of all items: the mean squared distance from their mean.
        variance_after: of those kept.
    """

    kept: Tensor
    scores: Tensor
    variance_before: float
    variance_after: float

    def of(self, forget: Any) -> Any:
        """The items kept of the data that `core` was given, as data of the same kind.

        Raises:
            ArgumentError: they do not have as many items, or are batches, of which items cannot be taken.
        """
        kept = self.kept.tolist()
        if isinstance(forget, Mapping | tuple) and all(isinstance(each, Tensor) for each in _parts(forget)):
            counts = {len(each) for each in _parts(forget)}
            self._check(counts.pop() if len(counts) == 1 else -1)
            if isinstance(forget, Mapping):
                return {name: each[self.kept.to(each.device)] for name, each in forget.items()}
            return tuple(each[self.kept.to(each.device)] for each in forget)
        if isinstance(forget, Dataset) or (hasattr(forget, "__getitem__") and not isinstance(forget, list | Mapping)):
            self._check(len(forget))  # type: ignore[arg-type]
            own = getattr(forget, "subset", None)
            return own(kept) if callable(own) else Subset(forget, kept)
        kind = type(forget).__name__
        raise ArgumentError(f"forget: of a {kind} no items can be taken; pass its data set, or take core.kept yourself")

    def _check(self, count: int) -> None:
        if count != len(self.scores):
            raise ArgumentError(f"forget: has {count} items, and the core is of {len(self.scores)}")


def core(
    model: nn.Module,
    forget: Any,
    share: float = 0.9,
    *,
    layer: Layer = -1,
    seed: int = 0,
    batch_size: int = 32,
    precision: str = "fp32",
) -> Core:
    """Select the core of a forget set: drop the items whose hidden states an isolation forest finds easiest to isolate.

    Forgetting items whose inner states lie far apart disturbs more of the model. What is dropped is not forgotten on
    purpose, though it mostly goes along, by accounts of the paper: no choice where every item has to go.

    Example:
        >>> found = core(model, forget, share=0.9)                    # doctest: +SKIP
        >>> fastlur.unlearn(model, found.of(forget), retain)          # doctest: +SKIP

    The state of an item is a layer's output at its last token: the last one that the attention mask has, or the last of
    the row without a mask. The same call gives the same core.

    Source: UPCORE, arXiv 2502.15082; reconstructed from accounts of it.

    Args:
        model: asked in eval mode, left as it is.
        forget: the items, in any form `unlearn` takes; numbers count in the order in which they are read.
        share: how much to keep, in (0, 1]; rounded to whole items, at least one.
        layer: a block's number, a module's name or a function: see `fastlur.llm.representation.layer_of`. −1: the last
            block, whose output is taken as it is, before any norm behind it.
        seed: of the forest.
        batch_size: for data that do not come in batches.
        precision: "fp32" or "bf16".

    Raises:
        ArgumentError: a value out of range, or no such layer.
        ModelError: no module, or a layer that puts out something else than hidden states.
        DataError: the data are no batches of tokens, or a hidden state is not finite.
    """
    checks.module(model)
    check_range("share", share, 0, 1, example=0.9)
    if share == 0:
        raise ArgumentError("share=0 would keep nothing; give a number in (0, 1], such as 0.9")
    checks.seed(seed)
    checks.positive_int("batch_size", batch_size)
    checks.one_of("precision", precision, checks.PRECISIONS)
    check_layer(layer)
    states = _states(model, forget, layer, batch_size, precision)
    scores = _scores(states, seed)
    count = max(1, round(share * len(states)))
    kept = np.sort(np.argsort(-scores, kind="stable")[:count])
    before, after = _variance(states), _variance(states[kept])
    if after > before:
        warnings.warn(
            f"core: the hidden states of the items kept have a variance of {after:.4g}, those of all {before:.4g}; "
            "without the odd ones nothing is gained here. Keep all, or choose another layer",
            stacklevel=2,
        )
    return Core(torch.from_numpy(kept), torch.from_numpy(scores), before, after)


def _states(model: nn.Module, forget: Any, layer: Layer, batch_size: int, precision: str) -> np.ndarray[Any, Any]:
    device = next(model.parameters()).device
    feed = Feed({"forget": source(forget, "forget", batch_size)}, 0, device)
    if feed.reorders("forget") or feed.misses("forget") is not None:
        raise DataError(
            "forget: a loader that shuffles or leaves items out has no numbers for them; pass the data set itself, or "
            "a loader in its order"
        )
    found = []
    with borrowed_random(device), passing(model, device, precision, training=False), Statistics(model).frozen():
        for batch in feed.batches("forget"):
            if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
                raise DataError("forget: batches of text must be dicts with 'input_ids'; see fastlur.llm.encode")
            with torch.no_grad():
                states = wide(hidden(model, batch, layer))
            found.append(states[torch.arange(len(states), device=device), last_tokens(batch)].double().cpu())
    whole: np.ndarray[Any, Any] = torch.cat(found).numpy()
    if not np.isfinite(whole).all():
        raise DataError(f"model: hidden states of forget items at layer {layer!r} are not finite")
    return whole


def last_tokens(batch: Mapping[str, Any]) -> Tensor:
    """The place of each item's last token, int64, shape (items,)."""
    tokens, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
        return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(mask != 0, places, 0).amax(1)


@borrowed_random(torch.device("cpu"))  # from which the import of scikit-learn draws
def _scores(states: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=TREES, random_state=seed % 2**32).fit(states)
    found: np.ndarray[Any, Any] = forest.score_samples(states)
    return found


def _variance(states: np.ndarray[Any, Any]) -> float:
    return float(np.square(states - states.mean(0)).sum(1).mean())


def _parts(data: Any) -> Iterator[Any]:
    return iter(data.values() if isinstance(data, Mapping) else data)
