"""Buffers of a model, its normalisation statistics above all: which pass moves them, and how a bad step is undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Statistics:
    """The buffers of a module while steps run over it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = list(model.modules())
        self._norms = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
        ours = {id(m) for m in self._norms}
        self._others = [m for m in modules if id(m) not in ours]
        self._all = [*self._norms, *self._others]
        self._saved: list[Saved] = []

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, a forward in train mode moves no buffer: it normalises by the batch and leaves no trace.

        Batch norm is told not to track, which costs nothing; buffers of any other module (running instance norms,
        power iterations, averages) are put back.
        """
        before = _copies(self._others)
        for norm in self._norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in self._norms:
                norm.track_running_stats = True
            known = {(id(module), name) for module, name, _ in before}
            for module in self._others:
                for name in [n for n in module._buffers if (id(module), n) not in known]:
                    del module._buffers[name]
            for module, name, value in before:
                _put(module, name, value)

    def copies(self) -> list[Saved]:
        """Every buffer as it is now, to be used with `at`."""
        return _copies(self._all)

    @contextmanager
    def at(self, saved: list[Saved]) -> Iterator[None]:
        """Inside, the buffers have the values that they had when `saved` was made."""
        before = self.copies()
        try:
            for module, name, value in saved:
                _put(module, name, value)
            yield
        finally:
            for module, name, value in before:
                _put(module, name, value)

    def put(self, saved: list[Saved]) -> None:
        """Give the buffers the values that they had when `saved` was made; those that came since then go."""
        known = {(id(module), name) for module, name, _ in saved}
        for module in (*self._norms, *self._others):
            for name in [name for name in module._buffers if (id(module), name) not in known]:
                del module._buffers[name]
        for module, name, value in saved:
            _put(module, name, value)

    def take(self, values: Mapping[str, Tensor | None]) -> None:
        """Give the buffers these values, by their names in the model."""
        for name, value in values.items():
            owner, _, last = name.rpartition(".")
            _put(self.model.get_submodule(owner), last, None if value is None else value.detach())

    def save(self) -> None:
        """Remember the buffers as they are, before the passes of a step."""
        now = [(module, name, buffer) for module in self._all for name, buffer in module._buffers.items()]
        if [_kind(each) for *_, each in now] == [_kind(each) for *_, each in self._saved]:
            # the copies of the step before, written anew
            olds = [value for *_, value in self._saved if value is not None]
            if olds:
                torch._foreach_copy_(olds, [buffer.detach() for *_, buffer in now if buffer is not None])
            self._saved = [(*place[:2], value) for place, (*_, value) in zip(now, self._saved, strict=True)]
        else:
            self._saved = _copies(self._all)

    def keep(self, ok: Tensor) -> None:
        """Keep what has moved since `save` where the flag `ok`, a 0-d tensor, is up; put it back where it is down."""
        if ok.device.type == "cpu" and bool(ok):
            return
        now, then = [], []
        for module, name, before in self._saved:
            buffer = module._buffers.get(name)
            if buffer is not None and before is not None and buffer.shape == before.shape:
                now.append(buffer.detach())
                then.append(before)
            elif not bool(ok):  # waits for the device, but only for buffers that come, go or grow
                _put(module, name, None if before is None else before.clone())
        put_back(now, then, ok)


Saved = tuple[nn.Module, str, Tensor | None]


def put_back(now: Sequence[Tensor], before: Sequence[Tensor], ok: Tensor) -> None:
    """now ← before where the flag `ok` is down, decided on the device, whatever the values: by their bits.

    Integers of the same width wrap around, so now + (before − now) is before exactly, NaN and infinities too; and a
    list of tensors takes three operations, not three a tensor.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    down = ok <= 0
    for size in {tensor.itemsize for tensor in now}:
        pairs = [(x, y) for x, y in zip(now, before, strict=True) if x.itemsize == size]
        if size not in bits:
            for x, y in pairs:
                x.copy_(torch.where(down, y, x))
            continue
        here, there = ([each.view(bits[size]) for each in side] for side in zip(*pairs, strict=True))
        change = torch._foreach_sub(there, here)
        torch._foreach_mul_(change, down.to(bits[size]))
        torch._foreach_add_(here, change)


def _kind(buffer: Tensor | None) -> object:
    return None if buffer is None else (buffer.shape, buffer.dtype, buffer.device)


def _copies(modules: list[nn.Module]) -> list[Saved]:
    return [
        (module, name, None if buffer is None else buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
    ]


def _put(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Give a buffer a value, in place where it can be: others may hold it."""
    now = module._buffers.get(name)
    if now is None or value is None or now.shape != value.shape:
        module._buffers[name] = value
    else:
        with torch.no_grad():
            now.copy_(value)
