"""How far an update can take the weights at most: so that one that overflows is noticed before it is made.

What overflowed cannot be brought back, and a copy to go back to would cost a vector. The largest weight and the largest
moment after a step are bounded by those before it and the norms of the direction, which are at hand: no walk over the
data, only two in every `EVERY` steps, which keep the bound from drifting away. It is loose by many orders of magnitude,
and float32, bfloat16 and float64 have as many to spare; float16 has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlur.reference import L1, LR, MOMENTUM, PROX, SCALE, WEIGHT_DECAY

EVERY = 8  # steps between two looks at the weights themselves
SPARE = 2.0**100  # a bound this loose is of use where numbers reach beyond it
FARTHEST = 100  # of a step of AdamW, in learning rates: 7.3 by Cauchy-Schwarz with its usual betas, before rounding
MARGIN = 4  # for what is added up on the way, and for rounding


class Reach:
    """The largest weight and moment there can be, kept from step to step on the device.

    Args:
        theta: the flat buffers of the weights.
        first: those of the first moment.
        adamw: the rule is AdamW, else SGD.
    """

    def __init__(self, theta: Sequence[Tensor], first: Sequence[Tensor], adamw: bool) -> None:
        self._theta, self._first, self._adamw = theta, first, adamw
        self._largest = torch.zeros(2, dtype=torch.float64, device=theta[0].device)
        self._limit = most(theta) / MARGIN
        self._known: dict[int, tuple[int, Tensor]] = {}
        self._left = 0

    def look(self, now: bool = False) -> None:
        """Look at the weights and moments themselves, if it is time to."""
        if self._left and not now:
            self._left -= 1
            return
        self._left = EVERY - 1
        self._largest.copy_(torch.stack([largest(self._theta), largest(self._first)]))

    def forget(self) -> None:
        """What was seen holds no longer: the next `look` is one, whatever is loaded until then."""
        self._left = 0

    def advance(
        self,
        dots: Tensor,
        control: Tensor,
        hyper: Tensor,
        theta0: Sequence[Tensor] | None,
        fisher: Sequence[Tensor] | None,
    ) -> Any:
        """Whether the step about to be made surely stays within what the weights can hold; counts it as made.

        Args:
            dots: (⟨r,f⟩, ‖r‖², ‖f‖²) of the two halves of the direction.
            control: decided.
            hyper: the hyper-parameters of the update.
            theta0: centre of a proximal term, if there is one.
            fisher: its weights.

        Returns:
            A truth value; on the CPU Python's, elsewhere a 0-d tensor.
        """
        pull: Any = 0.0
        if theta0 is not None:
            centre, weight = self._cached(theta0), 1.0 if fisher is None else self._cached(fisher)
            pull = (self._largest[0] + centre) * weight
        given = dots, control, hyper, self._largest
        host = on_host(dots)  # there, numbers of Python are ten times as fast as tensors of one
        (_, aa, uu), state, numbers, (weights, moments) = (t.tolist() if host else t.unbind() for t in given)
        pull = float(pull) if host else pull
        lr, momentum, decay = numbers[LR], numbers[MOMENTUM], numbers[WEIGHT_DECAY]
        gradient = state[SCALE] * (aa**0.5 + uu**0.5) + numbers[L1] + numbers[PROX] * pull
        if self._adamw:
            moments = momentum * moments + (1 - momentum) * gradient
            weights = weights * (1 + lr * decay) + lr * FARTHEST
        else:
            moments = momentum * moments + gradient + decay * weights
            weights = weights + lr * moments
        if host:
            self._largest[0], self._largest[1] = weights, moments
        else:
            self._largest.copy_(torch.stack([weights, moments]))
        return weights + moments <= self._limit

    def _cached(self, vector: Sequence[Tensor]) -> Tensor:
        """The largest element of a vector that seldom changes; a walk over it only then."""
        key, version = vector[0].data_ptr(), sum(flat._version for flat in vector)
        if self._known.get(key, (None,))[0] != version:
            self._known[key] = version, largest(vector)
        return self._known[key][1]


def on_host(value: Tensor) -> bool:
    """Whether looking at a value waits for nothing."""
    return value.device.type == "cpu"


def largest(flats: Sequence[Tensor]) -> Tensor:
    """The largest absolute value, float64, shape (); NaN if one is. 0 for no elements."""
    extremes = [extreme.double().abs() for flat in flats if flat.numel() for extreme in flat.aminmax()]
    return torch.stack(extremes).max() if extremes else torch.zeros((), dtype=torch.float64)


def most(flats: Sequence[Tensor]) -> float:
    """The largest number that each of them can hold."""
    return min(torch.finfo(flat.dtype).max for flat in flats)
