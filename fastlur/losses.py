"""Forget and retain losses: functions `(model, batch) -> scalar` to minimise.

A batch is `(inputs, targets)`, or a dict whose "labels" (or "label", "targets", "target") are the targets and whose
other items are the model's keyword arguments. The model returns logits, or an object (or a dict) with `.logits`;
classes are the last dimension of logits for every target: shape (*targets.shape, classes).

Text is read with the same losses: of a causal language model (see `fastlur.task`) the logits at one place are compared
with the label of the next, so that labels stand where their tokens stand and −100 where they do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastlur.errors import ArgumentError, DataError, check_flags, first_line, number
from fastlur.task import CAUSAL, known

IGNORED = -100  # cross-entropy's own mark for a target that does not count
ABOVE_CHANCE = 10.0  # nats
TARGETS = ("labels", "label", "targets", "target")
PREFERRED = "preferred_"  # what stands under such names is another answer, for losses that compare the two


def split(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch; targets are None where the batch has none."""
    if isinstance(batch, Mapping):
        name = next((name for name in TARGETS if name in batch), None)
        inputs = {k: v for k, v in batch.items() if k != name and not str(k).startswith(PREFERRED)}
        return inputs, None if name is None else batch[name]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def logits_and_targets(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Run the model: logits, shape (n, classes), and targets, shape (n,), one row a target.

    Of a causal language model the targets are those of the next place; the last place of a text has none (−100).

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
    ahead = reads_ahead(model, batch)
    if ahead and (targets.dim() != 2 or targets.shape[1] < 2):
        raise DataError(
            f"forget/retain: labels of text must have shape (items, tokens), at least two tokens, got "
            f"{tuple(targets.shape)}; see fastlur.llm.encode, or pass task='classification'"
        )
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits = logits_in(output, targets.shape)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        wanted = "(items, tokens, words)" if ahead else "(*targets.shape, classes)"
        raise DataError(
            f"model: returned {shape} for targets of shape {tuple(targets.shape)}; it should be logits of {wanted}; "
            "for another model pass loss= and forget_loss=, such as fastlur.losses.own_loss"
        )
    if ahead:  # the targets are moved, not the logits, of which there are many
        targets = following(targets)
    return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)


def reads_ahead(model: Any, batch: Any) -> bool:
    """Whether logits speak of the next label: as `fastlur.task` says, or, where nobody does, as the batch looks."""
    return (known(model) or (CAUSAL if is_text(batch) else None)) == CAUSAL


def is_text(batch: Any) -> bool:
    """Whether the labels are the batch's own input_ids, or, without names, its inputs, wherever they count."""
    inputs, targets = split(batch)
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not (isinstance(ids, Tensor) and isinstance(targets, Tensor) and ids.shape == targets.shape and ids.dim() == 2):
        return False
    counts = targets != IGNORED
    return bool(counts.any()) and torch.equal(targets[counts], ids[counts])


def logits_in(output: Any, shape: torch.Size) -> Any:
    """The logits that a model has returned for targets of a shape.

    What stands under that name, as an item or an attribute; of a tuple the one tensor that is of that shape but for its
    last dimension; or all of it.
    """
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        fits = [part for part in output if isinstance(part, Tensor) and part.shape[:-1] == shape and part.dim()]
        return fits[0] if len(fits) == 1 else output
    return getattr(output, "logits", output)


def following(labels: Tensor) -> Tensor:
    """At each place the label of the next, shape (items, tokens); −100 at the last."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that the model computes of a batch itself, labels included: `model(**batch).loss`.

    Of a tuple it is the first single number. For modules that return no logits:
    `unlearn(…, loss=own_loss, forget_loss=BoundedForgetting(12.0, loss=own_loss))`.

    Raises:
        DataError: the batch is no dict, or the model returns no loss.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"forget/retain: a {type(batch).__name__} is no dict of the model's arguments")
    output = model(**batch)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, tuple) and value is None:
        value = next((part for part in output if isinstance(part, Tensor) and not part.dim()), None)
    if not isinstance(value, Tensor):
        raise DataError(f"model: returned a {type(output).__name__} without a loss; pass loss= and forget_loss=")
    return value


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

    In text no statistics are shared, but a batch's tokens differ widely: a few that have become very unlikely would
    bring the mean to its cap while the others are known as before. There every token has a cap of its own.

    Args:
        cap: nats, > 0. None: log(classes) + 10, that is 10 nats above guessing at random (12.3 for ten classes); per
            target log(classes), that is guessing.
        per_target: cap every target (token) by itself: −mean min(cross-entropy, cap). None: in text.
        loss: what is driven up in place of the cross-entropy, `(model, batch) -> scalar`, such as `own_loss`; it needs
            a cap, and has no targets.

    Raises:
        ArgumentError: cap is not a positive number, or is missing; loss cannot be called.
    """

    def __init__(
        self,
        cap: float | None = None,
        *,
        per_target: bool | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        if cap is not None and not (number(cap) and cap > 0):
            raise ArgumentError(f"cap={cap!r} must be a positive number of nats, or None for log(classes) + 10")
        if per_target is not None:
            check_flags(per_target=per_target)
        if loss is not None and (not callable(loss) or per_target):
            raise ArgumentError(f"loss={loss!r} must be (model, batch) -> scalar, without per_target, or None")
        if loss is not None and cap is None:
            raise ArgumentError("cap=None: a loss of your own has no number of classes; give its cap, such as 12.0")
        self.cap, self.per_target, self.loss = cap, per_target, loss

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """−min(mean cross-entropy, cap), shape ()."""
        if self.loss is not None:
            return -_at_most(self.loss(model, batch), self.cap)
        each = reads_ahead(model, batch) if self.per_target is None else self.per_target
        return bounded(*logits_and_targets(model, batch), self.cap, each)

    def __repr__(self) -> str:
        more = "" if self.per_target is None else f", per_target={self.per_target}"
        more += f", loss={getattr(self.loss, '__name__', self.loss)}" if self.loss else ""
        return f"BoundedForgetting(cap={self.cap}{more})"


def bounded(logits: Tensor, targets: Tensor, cap: float | None, per_target: bool = False) -> Tensor:
    """−min(mean cross-entropy, cap) of logits, shape (n, classes), and targets, shape (n,); see `BoundedForgetting`."""
    if cap is None:
        cap = math.log(logits.shape[-1]) + (0.0 if per_target else ABOVE_CHANCE)
    if not per_target:
        return -_at_most(_mean_cross_entropy(logits, targets), cap)
    each = _at_most(functional.cross_entropy(wide(logits), targets, reduction="none"), cap)
    counts = targets != IGNORED
    return -torch.where(counts, each, 0.0).sum() / counts.sum().clamp(min=1)


def _at_most(loss: Tensor, cap: float | None) -> Tensor:
    most = torch.finfo(loss.dtype).max if cap is None else min(float(cap), torch.finfo(loss.dtype).max)
    return torch.where(loss > most, loss.new_full((), most), loss)


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
    return temperature**2 * (rows * counts).sum() / counts.sum().clamp(min=1)


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
        raise DataError(f"a target is outside the model's {logits.shape[-1]} logits: {first_line(error)}") from error
