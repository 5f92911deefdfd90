"""A model run over a few items at a time, for batches whose activations do not fit into memory.

Not the loss is taken in parts, which would change it where it is no plain mean, but the model under it: a forward in
parts gives the outputs of the whole batch, one row an item, and the loss sees them all. Each part's activations are
dropped and made again in the backward pass. So any loss has the same value and gradient up to rounding, for one more
forward a pass, as long as an item's output depends on that item alone.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from fastlur.errors import ModelError, first_line
from fastlur.rows import parts_of, rows_of, tensors_of
from fastlur.statistics import Statistics
from fastlur.world import borrowed_random, kept_modes, seed_torch

T = TypeVar("T")
REMEDY = "lower batch_size"
COMPARED = 8  # items that are looked at to see whether they mind each other
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative to the largest output; others: 5 %


class Spare:
    """How many items at a time the model takes: a whole batch, until memory runs out.

    Attributes:
        rows: items at a time; None: whole batches.

    Args:
        module: the model.
        forward: what runs it, such as its compiled form.
        rows: to begin with, as somebody has asked for; None: whole batches.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], rows: int | None = None) -> None:
        self._module, self._forward, self.rows, self._asked = module, forward, rows, rows
        self._seen: set[bool] = set()

    @property
    def forward(self) -> Callable[..., Any]:
        """What losses call as the model."""
        return self._few(self._forward)

    @property
    def plain(self) -> Callable[..., Any]:
        """The same without a compiled form."""
        return self._few(self._module)

    def _few(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        if self.rows is None:
            return forward
        return MicroBatches(self._module, forward, self.rows, self._seen, self.rows == self._asked)

    def run(self, attempt: Callable[[], T], batch: Any, undo: Callable[[], None] = lambda: None) -> T:
        """Run it; where memory runs out, `undo` what it did and run it again with fewer items at a time, from then on.

        Args:
            attempt: calls `forward` or `plain`, asking for it anew each time.
            batch: the batch that it works on.
            undo: called after every attempt that failed.

        Raises:
            ModelError: the model cannot be run in parts, or memory is short for a single item.
        """
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as error:
                said = first_line(error)
            undo()  # outside of the clause: the error holds on to everything that the attempt had
            self._take_fewer(said, rows_of(batch))

    def _take_fewer(self, said: str, size: int | None) -> None:
        known = [each for each in (self.rows, size) if each is not None]
        now = min(known) if known else 1
        if now < 2:
            raise ModelError(
                f"model: memory ran out with one item at a time ({said}); use a smaller model or precision"
            )
        refuse(self._module, f"memory ran out with {now} items at a time ({said})")
        self.rows = -(-now // 2)
        warnings.warn(
            f"memory ran out with {now} items at a time ({said}); from now on the model takes {self.rows} at a time, "
            "which costs one more forward a pass and changes gradients by rounding only (dropout draws other masks)",
            stacklevel=3,
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class MicroBatches:
    """Stands in for a model that is called with a batch, and runs it over so many rows at a time.

    Tensors with as many rows as the first one are divided, everything else is passed as it is. The output may be a
    tensor with a row an item, or tuples, dicts and objects of such.

    Args:
        module: the model, whose other attributes this one has too.
        forward: what runs it.
        rows: at a time.
        seen: the modes in which the items were found to be independent of each other; added to.
        asked: because somebody wants it so, not because memory ran out.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], rows: int, seen: set[bool], asked: bool = False
    ) -> None:
        self._module, self._forward, self._rows, self._seen, self._asked = module, forward, rows, seen, asked

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The output for the whole batch.

        Raises:
            ModelError: items of a batch are not independent of each other in this model.
        """
        size = rows_of((inputs, named))
        if size is None or size <= self._rows:
            return self._forward(*inputs, **named)
        why = f"memory ran out with more than {self._rows} items at a time"
        if self._asked:
            why = f"micro_batch={self._rows} has it run in parts (None does not)"
        refuse(self._module, why)
        self._compare(inputs, named, size, why)

        def run(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            return self._forward(*arguments, **keywords)

        parts = []
        for part in parts_of((inputs, named), size, self._rows):
            again = torch.is_grad_enabled()
            parts.append(checkpoint(run, *part, use_reentrant=False) if again else run(*part))
        return _joined(parts, [min(self._rows, size - at) for at in range(0, size, self._rows)])

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._module

    def of(self, other: nn.Module) -> MicroBatches:
        """The same of another network, in eval mode, in which items are not normalised by each other."""
        return MicroBatches(other, other, self._rows, {False}, self._asked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _compare(self, inputs: Any, named: Any, size: int, why: str) -> None:
        """Look once a mode whether an item's output depends on the others, and what a forward leaves behind.

        Dropout is off meanwhile. A model that draws numbers otherwise is looked at in eval mode.
        """
        module = self._module
        if module.training in self._seen:
            return
        count = min(size, max(2, min(self._rows, COMPARED)))
        few = next(parts_of((inputs, named), size, count))
        statistics, device = Statistics(module), next(module.parameters()).device
        buffers = statistics.copies()

        def outputs(rows: int, seed: int) -> list[Tensor]:
            seed_torch(seed, device)
            parts = [self._forward(*arguments, **keywords) for arguments, keywords in parts_of(few, count, rows)]
            return list(tensors_of(_joined(parts, [min(rows, count - at) for at in range(0, count, rows)])))

        short, odd = False, None
        with torch.no_grad(), borrowed_random(device), kept_modes(module):
            try:
                for each in module.modules():
                    if isinstance(each, _DropoutNd):
                        each.training = False
                whole = outputs(count, 1)
                trace = not _same_buffers(buffers, statistics.copies())
                if not all(map(_close, whole, outputs(count, 2))):
                    module.eval()
                    whole = outputs(count, 1)
                kept = _left_behind(module)
                apart = outputs(-(-count // 2), 1)
                odd = _differing(kept, _left_behind(module))
            except torch.OutOfMemoryError:
                if self._rows > 1:
                    raise
                short = True
            finally:
                statistics.put(buffers)
        if short:
            raise ModelError(f"model: {why}, too few to see whether its outputs depend on each other; {REMEDY}")
        if trace:
            raise ModelError(f"model: {why}, and a forward moves its buffers, in parts several times; {REMEDY}")
        if not all(map(_close, whole, apart)):
            raise ModelError(f"model: {why}, and its outputs depend on the whole batch; {REMEDY}")
        if odd is not None:
            raise ModelError(f"model: {why}, and a forward leaves {odd!r} on it, in parts that of the last; {REMEDY}")
        self._seen.add(module.training)


def alike(model: Any, other: nn.Module) -> Any:
    """Another network in eval mode, run over as many rows at a time as `model` is: all, or those of `MicroBatches`."""
    return model.of(other) if isinstance(model, MicroBatches) else other


def refuse(module: nn.Module, why: str) -> None:
    """Refuse a model with a layer that normalises by the batch as it stands.

    Raises:
        ModelError: it has one.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            kind = type(layer).__name__
            raise ModelError(
                f"model: {why}, and {name!r}, a {kind}, normalises by the whole batch, which cannot be taken in parts "
                f"then; {REMEDY}"
            )


def _joined(parts: list[Any], rows: list[int]) -> Any:
    """One output out of those of the parts."""
    first = parts[0]
    if isinstance(first, Tensor):
        if any(not each.dim() or each.shape[0] != count for each, count in zip(parts, rows, strict=True)):
            shape = tuple(first.shape)
            raise ModelError(
                f"model: returned a tensor of shape {shape} for {rows[0]} items, not a row an item; {REMEDY}"
            )
        return torch.cat(parts)
    if isinstance(first, Mapping):
        made = {}
        for name in first:
            try:
                made[name] = _joined([each[name] for each in parts], rows)
            except ModelError:
                if name == "logits" or "logits" not in first:  # a cache or the like beside them is nobody's loss
                    raise
        return made if type(first) is dict else type(first)(**made)
    if isinstance(first, tuple | list):
        made_of = [_joined(list(each), rows) for each in zip(*parts, strict=True)]
        return type(first)(*made_of) if hasattr(first, "_fields") else type(first)(made_of)
    if isinstance(getattr(first, "logits", None), Tensor):
        return _Logits(_joined([each.logits for each in parts], rows))
    if first is None:
        return None
    raise ModelError(f"model: returned a {type(first).__name__}, of which parts cannot be put together; {REMEDY}")


class _Logits:
    """What is left of an output that is some object."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def _left_behind(module: nn.Module) -> dict[str, Tensor]:
    """The tensors, neither parameters nor buffers, that lie on the model: what a forward notes and a loss may read."""
    return {
        f"{where}.{name}".lstrip("."): value.detach().clone()
        for where, each in module.named_modules()
        for name, value in vars(each).items()
        if isinstance(value, Tensor)
    }


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The name of a tensor that is not the same in both."""
    for name in one.keys() | other.keys():
        if name not in one or name not in other or one[name].shape != other[name].shape:
            return name
        if not _close(one[name], other[name]):
            return name
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return True
    scale = float(one.abs().max()) if one.numel() else 0.0
    return bool(((one - other).abs() <= TOLERANCE.get(one.dtype, 0.05) * scale).all()) or not bool(one.isfinite().all())


def _same_buffers(before: Any, now: Any) -> bool:
    values = [[(id(module), name, value) for module, name, value in each] for each in (before, now)]
    if [each[:2] for each in values[0]] != [each[:2] for each in values[1]]:
        return False
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for (*_, a), (*_, b) in zip(*values, strict=True)
    )
