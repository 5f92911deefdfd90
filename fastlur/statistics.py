"""Buffers of a model, its normalisation statistics above all: which pass moves them, and how a bad step is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Statistics:
    """The buffers of a module while steps run over it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        ours = {id(m) for m in self._norms}
        self._others = [(m, name) for m in model.modules() if id(m) not in ours for name in m._buffers]
        self._saved: list[Tensor] = []

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, a forward in train mode moves no buffer: it normalises by the batch and leaves no trace.

        Batch norm is told not to track, which costs nothing; buffers of any other module (running instance norms,
        power iterations, averages) are put back.
        """
        before = [(m, name, _clone(m._buffers[name])) for m, name in self._others]
        for norm in self._norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in self._norms:
                norm.track_running_stats = True
            with torch.no_grad():
                for module, name, value in before:
                    now = module._buffers[name]
                    if isinstance(now, Tensor) and value is not None and now.shape == value.shape:
                        now.copy_(value)
                    else:
                        module._buffers[name] = value

    def save(self) -> None:
        """Remember the buffers as they are, before the passes of a step."""
        with torch.no_grad():
            self._saved = [buffer.detach().clone() for buffer in self.model.buffers()]

    def keep(self, ok: Tensor) -> None:
        """Keep what has moved since `save` where the flag `ok`, a 0-d tensor, is up; put it back where it is down."""
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), self._saved, strict=True):
                buffer.copy_(torch.where(ok > 0, buffer, before))
        self._saved = []


def _clone(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
