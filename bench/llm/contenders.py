"""The methods: what each is given without a search, and what it is tuned by where there is one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:  # for `quality` and `machine`, which lie beside
    sys.path.insert(0, str(HERE.parent))

from quality.journal import Journal as Journal  # noqa: E402
from quality.journal import Row as Row  # noqa: E402
from quality.points import Knob, cube  # noqa: E402

from fastlur.llm import NPO, SimNPO  # noqa: E402
from fastlur.losses import BoundedForgetting, negative_cross_entropy  # noqa: E402
from fastlur.methods import METHODS  # noqa: E402

LR = {"tiny": 1e-3, "smollm2": 5e-5}  # where nothing is searched
SPAN = 10.0  # the learning rate is searched from a tenth of that to ten times it
FORGETTING: dict[str, Callable[[float], Any]] = {  # from the loss that the model has on authors it never met
    "strangers": BoundedForgetting,
    "bounded": lambda _: BoundedForgetting(per_target=True),  # the default of `unlearn` for text
    "ascent": lambda _: negative_cross_entropy,
    "npo": lambda _: NPO(),
    "simnpo": lambda _: SimNPO(),
}


@dataclass(frozen=True)
class Arm:
    """A method with its recipe and the space it is tuned in.

    Attributes:
        method: its name in `fastlur.methods`.
        recipe: arguments of the method where nothing is searched.
        knobs: at most two arguments that are searched.
        forget: of `FORGETTING`; None: the method has its own objective.
    """

    method: str
    recipe: tuple[tuple[str, Any], ...] = ()
    knobs: tuple[Knob, ...] = ()
    forget: str | None = None

    def config(self, model: str, number: int) -> dict[str, Any]:
        """Trial `number` as plain JSON: 0 is the recipe, the others are the points of the common search."""
        method, lr = dict(self.recipe), LR[model]
        if number:
            u = cube(number)
            method |= {knob.name: knob.at(u[1 + place]) for place, knob in enumerate(self.knobs)}
            lr = float(Knob("lr", lr / SPAN, lr * SPAN).at(u[0]))
        return {"method": method, "forget": self.forget, "lr": lr}


WEIGHT = Knob("forget_weight", 0.03, 3.0)
ALIGNED = (("inner_lr", 0.1), ("relative_inner_lr", True), ("forget_weight", 0.2))
JOINT = (("inner_lr", 0.0), ("gradient", "first_order"), ("forget_weight", 0.2))
INNER = Knob("inner_lr", 0.02, 1.0)

ARMS = {
    "lur": Arm("lur", ALIGNED, (WEIGHT, INNER), "strangers"),
    "lur_bounded": Arm("lur", ALIGNED, (WEIGHT, INNER), "bounded"),
    "lur_npo": Arm("lur", ALIGNED, (WEIGHT, INNER), "npo"),
    "mox": Arm("mox", (), (Knob("retain_limit", 0.005, 0.5),)),
    "gradient_difference": Arm("lur", JOINT, (WEIGHT,), "ascent"),
    "joint": Arm("lur", JOINT, (WEIGHT,), "strangers"),
    "npo": Arm("lur", JOINT, (WEIGHT,), "npo"),
    "simnpo": Arm("lur", JOINT, (WEIGHT,), "simnpo"),
    "fine_tune": Arm("fine_tune"),
}
ESSENTIAL = ("lur", "mox", "gradient_difference")


def options(arm: Arm, config: dict[str, Any], strangers: float) -> dict[str, Any]:
    """Arguments of `unlearn` from plain JSON, and the loss in nats of the model as given on authors it never met."""
    found: dict[str, Any] = {"method": METHODS[arm.method](**config["method"]), "lr": config["lr"]}
    if config["forget"] is not None:
        found["forget_loss"] = FORGETTING[config["forget"]](strangers)
    return found
