"""A model taken to another device for a call that may still be refused."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastlur.errors import ArgumentError, FastlurError, first_line


class Moved:
    """The model on a device; where the block ends with an error before `keep`, back with the very same tensors.

    The tensors that it came with are held until then: on another device, where they took room before as well.

    Args:
        model: moved in place.
        device: where to; None: it stays.

    Raises:
        ArgumentError: there is no such device, it holds no values ("meta"), or it has no room.
    """

    def __init__(self, model: nn.Module, device: Any) -> None:
        self._model, self._device = model, device
        self._parameters: list[tuple[nn.Module, str, nn.Parameter, Tensor, Tensor | None]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> Moved:
        if self._device is None:
            return self
        where = _usable(self._device)
        for module in self._model.modules():
            self._parameters += [(module, n, p, p.data, p.grad) for n, p in module._parameters.items() if p is not None]
            self._buffers += [(module, n, b) for n, b in module._buffers.items() if b is not None]
        try:
            self._model.to(where)
        except BaseException as error:
            self._put_back()
            if isinstance(error, FastlurError) or not isinstance(error, Exception):
                raise
            raise ArgumentError(f"device={self._device!r} cannot be used: {first_line(error)}") from error
        # what stayed where it was is not held: later storage would be needed twice
        self._parameters = [each for each in self._parameters if _replaced(each[0]._parameters.get(each[1]), each[3])]
        self._buffers = [each for each in self._buffers if each[0]._buffers.get(each[1]) is not each[2]]
        return self

    def keep(self) -> None:
        """From here on the model stays where it is now."""
        self._parameters, self._buffers = [], []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._put_back()
        self.keep()

    def _put_back(self) -> None:
        for module, name, parameter, data, gradient in self._parameters:
            module._parameters[name] = parameter  # "meta" and the like make new ones
            parameter.data, parameter.grad = data, gradient
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer


def _usable(device: Any) -> torch.device:
    """The device, tried out.

    Raises:
        ArgumentError: it is none, or cannot be used.
    """
    try:
        if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
            raise TypeError("it is no name of a device, such as 'cuda:0'")
        where = torch.device(device)
        if where.type == "meta":
            raise ValueError("it holds no values, and the model's would be lost")
        if bool(torch.zeros((), device=where)):
            raise RuntimeError("it does not compute")
    except Exception as error:  # torch's backends raise what they like
        raise ArgumentError(f"device={device!r} cannot be used: {first_line(error)}") from error
    return where


def _replaced(now: Tensor | None, data: Tensor) -> bool:
    return now is None or now.device != data.device
