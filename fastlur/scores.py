"""What a classifier says about each item of a data set, as numbers that attacks and metrics start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlur.data import source, to_device
from fastlur.errors import ArgumentError, DataError, ModelError, told
from fastlur.losses import IGNORED, logits_and_targets
from fastlur.outputs import entropy, log_odds, modified_entropy
from fastlur.world import borrowed_random, mode


class Scores(NamedTuple):
    """One entry an item (a target that counts), float64.

    Attributes:
        target: the true class.
        hit: 1 where the answer is right, else 0.
        loss: in nats.
        confidence: in the true class.
        log_odds: of the true class.
        entropy: of the answer, in nats.
        modified_entropy: see `fastlur.outputs`.
    """

    target: np.ndarray
    hit: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray
    log_odds: np.ndarray
    entropy: np.ndarray
    modified_entropy: np.ndarray

    def per_class(self) -> dict[int, float]:
        """Accuracy in percent of every class that occurs."""
        return {int(c): 100 * float(self.hit[self.target == c].mean()) for c in np.unique(self.target)}


def scores(model: nn.Module, data: Any, name: str, batch_size: int) -> Scores:
    """Run the model over the data called `name`, in eval mode, and leave no trace.

    Raises:
        ModelError, ArgumentError, DataError: the model, the batch size or the data are not usable.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: a {type(model).__name__} is no torch.nn.Module")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size!r} must be a positive whole number")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for parameter in model.parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError("model: a parameter has no shape yet; let the model see a batch first")
    if device.type == "meta":
        raise ModelError("model: is on the meta device, where there are no values; load it onto a real one")
    parts: list[Tensor] = []
    with mode(model, False), torch.no_grad(), borrowed_random(device):
        for batch in _read(source(data, name, batch_size).once(), name):
            with told(DataError, f"{name}: the model cannot take a batch"):
                logits, targets = logits_and_targets(model, to_device(batch, device))
            parts.append(_each(logits, targets.long(), name))
    if not parts or not sum(part.shape[1] for part in parts):
        raise DataError(f"{name}: is empty; pass at least one labelled item")
    return Scores(*torch.cat(parts, dim=1).cpu().numpy())


def _read(batches: Iterator[Any], name: str) -> Iterator[Any]:
    """The batches; what a data set of the caller's raises on the way is an error of the package.

    Raises:
        DataError: they cannot be read.
    """
    end = object()
    while True:
        with told(DataError, f"{name}: cannot be read"):
            batch = next(batches, end)
        if batch is end:
            return
        yield batch


def _each(logits: Tensor, targets: Tensor, name: str) -> Tensor:
    """The rows of `Scores` for one batch; targets of −100 do not count."""
    counted = targets != IGNORED
    logits, targets = logits[counted].double(), targets[counted]
    classes = logits.shape[-1]
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        raise DataError(f"{name}: holds labels outside the model's {classes} logits; labels go from 0 to {classes - 1}")
    loss = functional.cross_entropy(logits, targets, reduction="none")
    if not bool(torch.isfinite(loss).all()):
        raise DataError(f"{name}: the loss of an item is not finite; look for NaN in the data or the model")
    hit = (logits.argmax(-1) == targets).double()
    odds, doubt = log_odds(logits, targets), entropy(logits)
    return torch.stack((targets.double(), hit, loss, torch.exp(-loss), odds, doubt, modified_entropy(logits, targets)))
