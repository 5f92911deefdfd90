"""The search that every method is given: the same points of a cube, mapped into the space that each method declares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from scipy.stats import qmc

from fastlur.methods import METHODS

DIMENSIONS = 8  # learning rate, two knobs, target, part, schedule, statistics, clipping
TARGETS = ("own", "novice")
PARTS = {"none": 0.7, "trim": 0.85, "mask": 1.0}  # upper ends of their shares of the cube's side
LINEAR = 0.75  # the share of the linear schedule
NORMS = ("own", "retain")  # whose statistics batch norm takes in forget passes
CLIPS = (None, 1.0)  # norms that directions are clipped to
SPARSITY, SHARE = 0.97, 0.5  # of a trim and a mask where these are offered beside a method's own


@dataclass(frozen=True)
class Knob:
    """A number that a method is tuned by: `low` to `high`, in equal ratios unless `linear`."""

    name: str
    low: float
    high: float
    linear: bool = False
    whole: bool = False

    def at(self, u: float) -> float | int:
        """The value at u in [0, 1)."""
        value = (
            self.low + u * (self.high - self.low)
            if self.linear
            else math.exp(math.log(self.low) + u * math.log(self.high / self.low))
        )
        return round(value) if self.whole else float(f"{value:.3g}")


@dataclass(frozen=True)
class Arm:
    """A method with the space it is tuned in.

    Args:
        method: its name in `fastlur.methods`.
        fixed: arguments that every trial has.
        knobs: at most two.
        lr: the range of the learning rate; None: it takes no steps.
        open: it takes another forget loss than its own.
        trim: what a trim's sparsity is set by: "offered" beside others, the method's "own" by a knob, or None.
        mask: likewise.
        weighed: the knob `retain_weight` is retaining's share w of the sum of weights, as the joint loss has it: its
            forget weight is (1 − w) / w.
    """

    method: str
    knobs: tuple[Knob, ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    lr: tuple[float, float] | None = (0.003, 0.3)
    open: bool = False
    trim: str | None = "offered"
    mask: str | None = "offered"
    weighed: bool = False

    def config(self, number: int) -> dict[str, Any]:
        """Trial `number` as plain JSON: 0 is the package's default, the others are drawn."""
        found: dict[str, Any] = {"method": dict(self.fixed), "target": "own", "trim": None, "mask": None}
        if number == 0:
            return found | {"lr": None, "schedule": "linear"}
        u = cube(number)
        knobs = {knob.name: knob.at(u[1 + place]) for place, knob in enumerate(self.knobs)}
        found["method"] |= {name: value for name, value in knobs.items() if name not in ("trim", "mask")}
        found |= {name: knobs[name] for name in ("trim", "mask") if name in knobs}
        if self.weighed:
            share = found["method"].pop("retain_weight")
            found["method"]["forget_weight"] = float(f"{(1 - share) / share:.3g}")
        made = METHODS[self.method]
        if made.training and made.uses_forget:  # where it makes a difference whose statistics batch norm takes
            found["method"]["normalize_by"] = NORMS[int(u[6] * len(NORMS))]
        if self.open:
            found["target"] = TARGETS[int(u[3] * len(TARGETS))]
        part = next(name for name, end in PARTS.items() if u[4] < end)
        if part == "trim" and self.trim == "offered":
            found["trim"] = SPARSITY
        if part == "mask" and self.mask == "offered":
            found["mask"] = SHARE
        lr = None if self.lr is None else Knob("lr", *self.lr).at(u[0])
        if lr is not None:
            found["max_grad_norm"] = CLIPS[int(u[7] * len(CLIPS))]
        return found | {"lr": lr, "schedule": "linear" if u[5] < LINEAR else "constant"}


@cache
def _points() -> Any:
    return qmc.Sobol(DIMENSIONS, scramble=True, rng=2503).random(64)


def cube(number: int) -> tuple[float, ...]:
    """Point `number` ≥ 1, the same for every method."""
    return tuple(float(x) for x in _points()[number - 1])
