"""A model's weights and buffers, kept to go back to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastlur.interrupt import Whole
from fastlur.slots import Selection, select
from fastlur.space import ParameterSpace
from fastlur.statistics import Statistics


class Snapshot:
    """A copy of what can move: the chosen parameters and every buffer.

    It holds the parameter objects, so that it may be taken before a space is opened over them and put back within, and
    the other way round.

    Args:
        model: of which.
        parameters: which may move, as in `fastlur.slots.select`.
    """

    def __init__(self, model: nn.Module, parameters: Selection = None) -> None:
        self._parameters = list({id(p): p for _, p in select(model, parameters)}.values())
        self._weights = [p.detach().clone() for p in self._parameters]
        self._statistics = Statistics(model)
        self._buffers = self._statistics.copies()

    def take(self) -> None:
        """Keep the model as it is now instead."""
        with torch.no_grad():
            torch._foreach_copy_(self._weights, [p.detach() for p in self._parameters])
        self._buffers = self._statistics.copies()

    def put_back(self) -> None:
        """Give the model what was kept, without a break."""
        with Whole(), torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self._parameters], self._weights)
            self._statistics.put(self._buffers)


@contextmanager
def undone(space: ParameterSpace, statistics: Statistics) -> Iterator[None]:
    """What is done inside to the weights of an open space and to the buffers is undone where it ends with an error."""
    weights, buffers = space.copy(), statistics.copies()
    try:
        yield
    except BaseException:
        with Whole(), torch.no_grad():
            torch._foreach_copy_(space.theta.flats, weights.flats)
            statistics.put(buffers)
        raise
