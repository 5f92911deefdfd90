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

from fastlur.reference import HYPER, L1, LR, MOMENTUM, PROX, SCALE, WEIGHT_DECAY

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
        # what each hyper-parameter is a factor of in an update, at its own place: that sum is then one product
        self._terms = torch.zeros(HYPER, dtype=torch.float64, device=theta[0].device)
        self._terms[L1] = 1.0
        self._moment, self._weight, self._pull = (self._terms[place] for place in (MOMENTUM, WEIGHT_DECAY, PROX))
        self._largest = self._terms[MOMENTUM : WEIGHT_DECAY + 1 : WEIGHT_DECAY - MOMENTUM]  # moment, weight
        self._farthest = torch.tensor(FARTHEST, dtype=torch.float64, device=theta[0].device)
        self._limit = most(theta) / MARGIN
        self._known: dict[int, tuple[int, Tensor]] = {}
        self._left = 0

    def look(self, now: bool = False) -> None:
        """Look at the weights and moments themselves, if it is time to."""
        if self._left and not now:
            self._left -= 1
            return
        self._left = EVERY - 1
        self._largest.copy_(torch.stack([largest(self._first), largest(self._theta)]))

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
        centre = None if theta0 is None else self._cached(theta0)
        factor = None if centre is None or fisher is None else self._cached(fisher)
        if on_host(dots):  # there, numbers of Python are ten times as fast as tensors of one
            return self._on_host(dots, control, hyper, centre, factor)
        return self._on_device(dots, control, hyper, centre, factor)

    def _on_host(
        self, dots: Tensor, control: Tensor, hyper: Tensor, centre: Tensor | None, factor: Tensor | None
    ) -> bool:
        (_, aa, uu), state, numbers, (moments, weights) = (t.tolist() for t in (dots, control, hyper, self._largest))
        pull = 0.0 if centre is None else (weights + float(centre)) * (1.0 if factor is None else float(factor))
        lr, momentum, decay = numbers[LR], numbers[MOMENTUM], numbers[WEIGHT_DECAY]
        gradient = state[SCALE] * (aa**0.5 + uu**0.5) + numbers[L1] + numbers[PROX] * pull
        if self._adamw:
            moments = momentum * moments + (1 - momentum) * gradient
            weights = weights * (1 + lr * decay) + lr * FARTHEST
        else:
            moments = momentum * moments + gradient + decay * weights
            weights = weights + lr * moments
        self._largest[0], self._largest[1] = moments, weights
        return bool(weights + moments <= self._limit)

    def _on_device(
        self, dots: Tensor, control: Tensor, hyper: Tensor, centre: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        """The same, in few launches: each costs what all of this arithmetic does."""
        moment, weight = self._moment, self._weight
        end = L1 + 1
        if centre is not None:
            end = PROX + 1
            torch.add(weight, centre, out=self._pull)
            if factor is not None:
                self._pull.mul_(factor)
        begin = L1 if self._adamw else 0
        added = torch.dot(hyper[begin:end], self._terms[begin:end])  # in SGD momentum and decay are in it
        norms = dots[1:].sqrt().sum()
        if self._adamw:
            gradient = torch.addcmul(added, norms, control[SCALE])
            torch.lerp(gradient, moment, hyper[MOMENTUM], out=moment)
            weight.addcmul_(torch.addcmul(self._farthest, weight, hyper[WEIGHT_DECAY]), hyper[LR])
        else:
            torch.addcmul(added, norms, control[SCALE], out=moment)
            weight.addcmul_(moment, hyper[LR])
        return weight + moment <= self._limit

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
