"""What the model said as it was given, for losses that compare with it: log-probabilities of answers, or a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from fastlur import checks
from fastlur.data import Feed, source
from fastlur.errors import ArgumentError, DataError
from fastlur.fresh import copied, frozen
from fastlur.llm.likelihood import likelihood
from fastlur.llm.preferred import preferred_of
from fastlur.losses import PREFERRED
from fastlur.passes import Passes
from fastlur.statistics import Statistics
from fastlur.texts import check_known, find, keys_of
from fastlur.world import borrowed_random, mode, passing

T = TypeVar("T")
Keep = Literal["auto", "copy", "adapters"]
ALIKE = 1e-5  # relative to the largest logit


@dataclass(frozen=True, eq=False)
class ReferenceLogProbs:
    """log p(answer | prompt) of known items under a model that need not be there any more.

    Looked up on the batch's device without waiting for it. Items are told by a 64-bit hash of their tokens and of which
    of these count: padding on either side makes no difference where an attention mask says what is padding, nor does
    anything after the last token that counts.

    Args:
        keys: hashes, int64, ascending, shape (items,).
        log_probs: in nats, shape (items,).
    """

    keys: Tensor
    log_probs: Tensor

    def of(self, batch: Any) -> Tensor:
        """Of the items of a batch, shape (items,).

        Raises:
            DataError: an item is not among the known ones. On a GPU, which is not waited for, its log-probability is
                NaN instead, so that the step is refused as one whose loss is not finite.
        """
        wanted = keys_of(batch)
        keys, log_probs = (each.to(wanted.device, non_blocking=True) for each in (self.keys, self.log_probs))
        place, known = find(keys, wanted)
        check_known(known, "reference")
        return torch.where(known, log_probs[place], torch.nan)


def reference_log_probs(
    model: nn.Module, forget: Any, *, batch_size: int = 32, precision: str = "fp32"
) -> ReferenceLogProbs:
    """Ask a model once for the log-probabilities of all answers, the preferred ones included, in eval mode.

    `unlearn` does this by itself; it is for `MetaStep`, which does not see the data beforehand, for a reference that is
    not the model to be changed, and for several runs with one reference.

    Args:
        model: the reference; left as it is.
        forget: the items, in any form `unlearn` takes.
        batch_size: for data that do not come in batches.
        precision: "fp32" or "bf16".

    Raises:
        ArgumentError, ModelError, DataError: an argument out of range, no module, or batches that are no text.
    """
    checks.module(model)
    checks.positive_int("batch_size", batch_size)
    checks.one_of("precision", precision, checks.PRECISIONS)
    device = next(model.parameters()).device
    feed = Feed({"forget": source(forget, "forget", batch_size)}, 0, device)
    with borrowed_random(device):
        return _gathered(feed, model, device, precision, lambda batch: likelihood(model, batch).log_probs)


def given_log_probs(passes: Passes) -> ReferenceLogProbs:
    """Those of the forget data of a run under the model as given, before its first step."""

    def ask(batch: Any) -> Tensor:
        return passes.spare.run(lambda: likelihood(passes.forward, batch).log_probs, batch)

    if not passes.has_feed:
        raise ArgumentError(
            "forget_loss: compares with the model as given, which cannot be asked about data that are not there yet; "
            "pass reference=fastlur.llm.reference_log_probs(model, forget)"
        )
    return _gathered(passes.feed, passes.space.model, passes.space.device, passes.precision, ask)


def _gathered(
    feed: Feed, model: nn.Module, device: torch.device, precision: str, ask: Callable[[Any], Tensor]
) -> ReferenceLogProbs:
    if (why := feed.misses("forget")) is not None:
        raise DataError(
            f"forget: a loader with {why} does not show every item once, and the reference must know them all before "
            "the first step; pass a loader that does, or the data set itself"
        )
    found: list[tuple[Tensor, Tensor]] = []
    with passing(model, device, precision, training=False), torch.no_grad(), Statistics(model).frozen():
        for batch in feed.batches("forget"):
            for each in _both(batch):
                log_probs = ask(each)  # first, since it says what is wrong with a batch that is no text
                found.append((keys_of(each), log_probs))
    keys, log_probs = (torch.cat(each) for each in zip(*found, strict=True))
    keys, order = keys.sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return ReferenceLogProbs(keys[first], log_probs[order][first])


def _both(batch: Any) -> Iterator[Any]:
    yield batch
    if isinstance(batch, Mapping) and any(str(name).startswith(PREFERRED) for name in batch):
        yield preferred_of(batch)


class Reference:
    """The model as given, to be asked while the model changes.

    Args:
        passes: of the run, before its first step.
        keep: "copy": a frozen copy of the model. "adapters": no copy; the model itself with its PEFT adapters switched
            off, which is the model as given as long as only adapters move and have not been trained before. "auto": the
            latter where it is seen to be right on a retain batch, otherwise the former.

    Raises:
        ArgumentError: "adapters", and it is seen not to be right.
    """

    def __init__(self, passes: Passes, keep: Keep) -> None:
        model = passes.space.model
        why = None if keep == "copy" else _why_not(passes)
        if keep == "adapters" and why is not None:
            raise ArgumentError(f"keep='adapters': {why}; use 'copy'")
        self.copies = keep == "copy" or why is not None
        self._model = frozen(copied(model)) if self.copies else model
        self._statistics = Statistics(model)

    def ask(self, question: Callable[[nn.Module], T]) -> T:
        """What it answers, in eval mode, without gradients."""
        with torch.no_grad(), mode(self._model, False):
            if self.copies:
                return question(self._model)
            with self._statistics.frozen(), without_adapters(self._model):
                return question(self._model)


def check_keep(keep: object) -> None:
    """Refuse an unknown way to keep a reference.

    Raises:
        ArgumentError: it is none.
    """
    checks.one_of("keep", keep, get_args(Keep))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model's PEFT adapters are switched off.

    PEFT's own `disable_adapter` changes which parameters require a gradient and does not put back what was frozen, so
    only its switch is set here, under which the layers pass on what they wrap.
    """
    layers = _adapted(model)
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


def _adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "_disable_adapters", None), bool)]


def _why_not(passes: Passes) -> str | None:
    """Why the model without its adapters is not the model as given; None: it is."""
    model = passes.space.model
    layers = _adapted(model)
    if not layers:
        return "the model has no PEFT adapters"
    inside = {id(p) for layer in layers for p in layer.parameters()}
    for layer in layers:
        base = getattr(layer, "base_layer", getattr(layer, "original_module", None))
        inside -= set() if base is None else {id(p) for p in base.parameters()}
    if any(id(leaf) not in inside for leaf in passes.space.leaves()):
        return "parameters move that belong to no adapter"
    if not passes.has_feed:
        return "there are no data to see by whether the adapters have been trained before"
    batch = next(iter(passes.feed.batches("retain", 1, draw="adapters")))
    with passing(model, passes.space.device, passes.precision, training=False), torch.no_grad():
        now = likelihood(model, batch).log_probs
        with without_adapters(model):
            bare = likelihood(model, batch).log_probs
    if bool(((now - bare).abs() > ALIKE * now.abs().max()).any()):
        return "the adapters have been trained before, so that the model without them is not the one that was given"
    return None
