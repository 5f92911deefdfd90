"""Buffers of a model, its normalisation statistics above all: which pass moves them, and how a bad step is undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        return _copies([*self._norms, *self._others])

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
        self._saved = self.copies()

    def keep(self, ok: Tensor) -> None:
        """Keep what has moved since `save` where the flag `ok`, a 0-d tensor, is up; put it back where it is down."""
        for module, name, before in self._saved:
            now = module._buffers.get(name)
            if now is None or before is None or now.shape != before.shape:
                if not bool(ok):  # waits for the device, but only for buffers that come, go or grow
                    _put(module, name, before)
                continue
            with torch.no_grad():
                now.copy_(torch.where(ok > 0, now, before))
        self._saved = []


Saved = tuple[nn.Module, str, Tensor | None]


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
