"""The search that every method is given: the same points of a cube, mapped into the space that each method declares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from scipy.stats import qmc

from fastlur.methods import LUR, METHODS

DIMENSIONS = 8  # learning rate, two knobs, target, part, schedule, statistics, clipping
TARGETS = ("own", "novice")
PARTS = {"none": 0.7, "trim": 0.85, "mask": 1.0}  # upper ends of their shares of the cube's side
LINEAR = 0.75  # the share of the linear schedule
NORMS = ("own", "retain")  # whose statistics batch norm takes in forget passes
CLIPS = (None, 1.0)  # norms that directions are clipped to
LENT = "lent"  # the trial with LUR's defaults, for those that can take them
SPARSITY, KEPT = 0.97, 0.5  # of a trim and a mask where these are offered beside a method's own


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
        like_lur: its defaults are LUR's, and where others have a target of their own it has the one of LUR.
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
    like_lur: bool = False
    weighed: bool = False

    def numbers(self, trials: int) -> list[int | str]:
        """Its trials: as many as all have and, where it takes a forget loss of the user's, LUR's defaults beside."""
        lent = self.open and self.method != "lur" and not self.like_lur
        return [*range(trials), *([LENT] if lent else [])]

    def config(self, number: int | str) -> dict[str, Any]:
        """Trial `number` as plain JSON: 0 is the package's default, `LENT` that of LUR, the others are drawn."""
        own = "default" if self.like_lur else "own"
        found: dict[str, Any] = {"method": dict(self.fixed), "target": own, "trim": None, "mask": None}
        if number == LENT or (number == 0 and self.like_lur):
            return found | self._lent()
        if number == 0:
            return found | {"lr": None, "schedule": "linear"}
        u = cube(int(number))
        knobs = {knob.name: knob.at(u[1 + place]) for place, knob in enumerate(self.knobs)}
        found["method"] |= {name: value for name, value in knobs.items() if name not in ("trim", "mask")}
        found |= {name: knobs[name] for name in ("trim", "mask") if name in knobs}
        if self.weighed:
            share = found["method"].pop("retain_weight")
            found["method"]["forget_weight"] = float(f"{(1 - share) / share:.3g}")
        made = METHODS[self.method]
        if made.training and made.uses_forget:  # where it makes a difference whose statistics batch norm takes
            found["method"]["normalize_by"] = NORMS[int(u[6] * len(NORMS))]
        if self.open and TARGETS[int(u[3] * len(TARGETS))] == "novice":
            found["target"] = "novice"
        part = next(name for name, end in PARTS.items() if u[4] < end)
        if part == "trim" and self.trim == "offered":
            found["trim"] = SPARSITY
        if part == "mask" and self.mask == "offered":
            found["mask"] = KEPT
        lr = None if self.lr is None else Knob("lr", *self.lr).at(u[0])
        if lr is not None:
            found["max_grad_norm"] = CLIPS[int(u[7] * len(CLIPS))]
        return found | {"lr": lr, "schedule": "linear" if u[5] < LINEAR else "constant"}

    def _lent(self) -> dict[str, Any]:
        """LUR's target, weight, rate, clipping and statistics; knobs that LUR has not are as they come."""
        method, scale = dict(self.fixed) | {"normalize_by": LUR.normalize_by}, 1.0
        names = {knob.name: knob for knob in self.knobs}
        if "forget_weight" in names:
            method["forget_weight"] = LUR.forget_weight
        elif "retain_weight" in names and names["retain_weight"].linear:  # a share: both losses are scaled by it
            scale = 1 / (1 + LUR.forget_weight)
            method["retain_weight"] = scale
        assert LUR.max_grad_norm is not None
        rate, norm = LUR.rates["sgd"] / scale, LUR.max_grad_norm * scale
        return {"method": method, "target": "default", "lr": rate, "max_grad_norm": norm, "schedule": "linear"}


@cache
def _points() -> Any:
    return qmc.Sobol(DIMENSIONS, scramble=True, rng=2503).random(64)


def cube(number: int) -> tuple[float, ...]:
    """Point `number` ≥ 1, the same for every method."""
    return tuple(float(x) for x in _points()[number - 1])
