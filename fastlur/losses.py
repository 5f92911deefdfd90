"""Forget and retain losses: functions `(model, batch) -> scalar` to minimise.

A batch is `(inputs, targets)`, or a dict whose "labels" (or "label", "targets", "target") are the targets and whose
other items are the model's keyword arguments. The model returns logits, or an object with `.logits`; classes are the
last dimension of logits for every target: shape (*targets.shape, classes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastlur.errors import ArgumentError, DataError, number

IGNORED = -100  # cross-entropy's own mark for a target that does not count
ABOVE_CHANCE = 10.0  # nats
TARGETS = ("labels", "label", "targets", "target")


def split(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch; targets are None where the batch has none."""
    if isinstance(batch, Mapping):
        name = next((name for name in TARGETS if name in batch), None)
        return {k: v for k, v in batch.items() if k != name}, None if name is None else batch[name]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def logits_and_targets(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Run the model: logits, shape (n, classes), and targets, shape (n,), one row a target.

    Raises:
        DataError: the batch has no integer targets, or logits and targets do not fit each other.
    """
    inputs, targets = split(batch)
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        kind = type(batch).__name__ if targets is None else getattr(targets, "dtype", type(targets).__name__)
        raise DataError(
            f"forget/retain: batches must be (inputs, integer class targets) or a dict with {TARGETS[0]!r}, got {kind}"
            "; for other data pass loss= and forget_loss="
        )
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"model: returned {shape} for targets of shape {tuple(targets.shape)}; classification needs logits of "
            "shape (*targets.shape, classes); for another model pass loss= and forget_loss="
        )
    return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)


def cross_entropy(model: Any, batch: Any) -> Tensor:
    """Mean cross-entropy in nats, the default retain loss of classification."""
    return _mean_cross_entropy(*logits_and_targets(model, batch))


def negative_cross_entropy(model: Any, batch: Any) -> Tensor:
    """Plain gradient ascent, −cross_entropy: unbounded below.

    It goes on pushing long after the data are forgotten, and then takes the rest of the model with it; use it with few
    steps, or prefer `BoundedForgetting`.
    """
    return -cross_entropy(model, batch)


class BoundedForgetting:
    """Gradient ascent that stops when it has done its work: −min(cross-entropy of the batch, cap).

    The default forget loss of classification. While the mean cross-entropy of the forget batch is below the cap this
    is `negative_cross_entropy`; at the cap its gradient is 0 and only the retain loss acts, until forgotten items come
    back below it. Plain ascent has no such end: its gradient does not vanish as the loss grows, and the retain accuracy
    collapses with enough steps.

    The cap is meant to end a runaway, not to say when enough is forgotten; that is the retain loss's part. It must not
    be tight: a batch of one class, normalised by its own statistics as in training, can have a cross-entropy of 5 nats
    in a model that still knows every item of it (measured on digits), and a cap of 5 would then forget nothing.

    Args:
        cap: nats, > 0. None: log(classes) + 10, that is 10 nats above guessing at random (12.3 for ten classes).

    Raises:
        ArgumentError: cap is not a positive number.
    """

    def __init__(self, cap: float | None = None) -> None:
        if cap is not None and not (number(cap) and cap > 0):
            raise ArgumentError(f"cap={cap!r} must be a positive number of nats, or None for log(classes) + 10")
        self.cap = cap

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """−min(mean cross-entropy, cap), shape ()."""
        logits, targets = logits_and_targets(model, batch)
        loss = _mean_cross_entropy(logits, targets)
        cap = math.log(logits.shape[-1]) + ABOVE_CHANCE if self.cap is None else self.cap
        most = min(float(cap), torch.finfo(loss.dtype).max)
        return -torch.where(loss > most, loss.new_full((), most), loss)

    def __repr__(self) -> str:
        return f"BoundedForgetting(cap={self.cap})"


class Remembering:
    """A model that is run once on the same inputs: called again with them, it returns what it returned.

    So a loss of the user's and one of a method share a forward, and statistics move once: a loss that makes inputs of
    its own out of those of the batch (an augmentation) has a forward of its own, and those after it run in `frozen`.

    Args:
        model: what is run.
        frozen: gives the context in which no statistics move.
    """

    def __init__(self, model: Any, frozen: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._model, self._known = model, dict[tuple[object, ...], tuple[Any, ...]]()
        self._frozen = frozen

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's output."""
        key = *map(id, inputs), *((name, id(value)) for name, value in named.items())
        if key not in self._known:
            with self._frozen() if self._known else nullcontext():
                output = self._model(*inputs, **named)
            self._known[key] = output, inputs, named  # held, so that no id is used again
        return self._known[key][0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def divergence(teacher: Tensor, logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · mean KL(softmax(teacher/T) ‖ softmax(logits/T)) in nats over the rows that count, shape ().

    Args:
        teacher: logits to compare with, shape (n, classes), without a gradient.
        logits: of the model, shape (n, classes).
        targets: shape (n,); only whether one is −100, a row that does not count, matters.
        temperature: T > 0; the factor T² keeps the size of the gradient.
    """
    wanted, given = (functional.log_softmax(wide(each) / temperature, dim=-1) for each in (teacher, logits))
    rows = relative_entropy(wanted, given)
    counts = (targets != IGNORED).to(rows.dtype)
    return temperature**2 * (rows * counts).sum() / counts.sum()


def relative_entropy(wanted: Tensor, given: Tensor) -> Tensor:
    """KL in nats of each row, shape (n,), of log-probabilities; what `wanted` rules out (−∞) adds nothing."""
    ruled_out = wanted == -torch.inf
    wanted, given = wanted.clamp(min=torch.finfo(wanted.dtype).min / 2), given.masked_fill(ruled_out, 0.0)
    return functional.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)


def distillation(teacher: Tensor, temperature: float = 1.0) -> Callable[[Any, Any], Tensor]:
    """The `divergence` from given logits as a loss `(model, batch) -> scalar`."""
    return lambda model, batch: divergence(teacher, *logits_and_targets(model, batch), temperature)


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least: logarithms of half precision are too rough."""
    return logits.float() if logits.is_floating_point() and logits.dtype.itemsize < 4 else logits


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    try:
        return functional.cross_entropy(wide(logits), targets)
    except IndexError as error:  # the CPU's; what could be checked beforehand was
        raise DataError(f"a target is outside the model's {logits.shape[-1]} logits: {error}") from error
