"""The methods: what each is given without a search, and what it is tuned by where there is one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:  # for `quality` and `machine`, which lie beside
    sys.path.insert(0, str(HERE.parent))

from machine import commit as commit  # noqa: E402
from machine import machine as machine  # noqa: E402
from quality.journal import Journal as Journal  # noqa: E402
from quality.journal import Row as Row  # noqa: E402
from quality.points import Knob, cube  # noqa: E402

from fastlur.llm import DPO, IDK, NPO, RMU, Collapse, ReferenceKL, SimNPO  # noqa: E402
from fastlur.losses import BoundedForgetting, negative_cross_entropy  # noqa: E402
from fastlur.methods import METHODS  # noqa: E402
from fastlur.targets import Novice  # noqa: E402

LR = {"tiny": 1e-3, "smollm2": 5e-5}  # where nothing is searched
SHARPNESS = 2.5  # of a novice's answers
SPAN = 10.0  # the learning rate is searched from a tenth of that to ten times it
DRAWN = 12  # tokens of an answer that is drawn


class Known(NamedTuple):
    """What a loss may be made from.

    Attributes:
        strangers: the loss in nats of the model as given on answers about authors that it never met.
        end: the token that ends an answer.
        novice: what answers as if it had never met the authors to forget; None: nobody asks for it.
    """

    strangers: float
    end: int
    novice: Novice | None = None


LOSSES: dict[str, Callable[[Known], dict[str, Any]]] = {
    "novice": lambda known: {"forget_loss": known.novice},
    "strangers": lambda known: {"forget_loss": BoundedForgetting(known.strangers, per_target=False)},
    "bounded": lambda _: {"forget_loss": BoundedForgetting()},  # the default of `unlearn` for text
    "ascent": lambda _: {"forget_loss": negative_cross_entropy},
    "kl": lambda _: {"forget_loss": negative_cross_entropy, "loss": ReferenceKL()},
    "npo": lambda _: {"forget_loss": NPO()},
    "simnpo": lambda _: {"forget_loss": SimNPO()},
    "dpo": lambda _: {"forget_loss": DPO()},
    "idk": lambda _: {"forget_loss": IDK()},
    "rmu": lambda _: {"forget_loss": MISDIRECTION.forget, "loss": MISDIRECTION.retain},
    "collapse": lambda known: {"forget_loss": Collapse(end=known.end, tokens=DRAWN)},
}
MISDIRECTION = RMU(lambda model: model.model.layers[len(model.model.layers) // 3], coefficient=2.0, retain_weight=1.0)
REFUSALS, CORE = "refusals", "core"  # forget data with another answer to each question, or those that lie together


@dataclass(frozen=True)
class Arm:
    """A method with its recipe and the space it is tuned in.

    Attributes:
        method: its name in `fastlur.methods`.
        recipe: arguments of the method where nothing is searched.
        knobs: at most two arguments that are searched.
        losses: of `LOSSES`; None: the method has its own objective.
        data: what is done to the forget data first: `REFUSALS`, `CORE`, or None.
        rate: times the learning rate of all, where nothing is searched.
        longer: whether it makes as many steps more as a novice has updates.
    """

    method: str
    recipe: tuple[tuple[str, Any], ...] = ()
    knobs: tuple[Knob, ...] = ()
    losses: str | None = None
    data: str | None = None
    rate: float = 1.0
    longer: bool = False

    def config(self, model: str, number: int) -> dict[str, Any]:
        """Trial `number` as plain JSON: 0 is the recipe, the others are the points of the common search."""
        method, lr = dict(self.recipe), LR[model] * self.rate
        if number:
            u = cube(number)
            method |= {knob.name: knob.at(u[1 + place]) for place, knob in enumerate(self.knobs)}
            lr = float(Knob("lr", LR[model] / SPAN, LR[model] * SPAN).at(u[0]))
        found = {"method": method, "losses": self.losses, "data": self.data, "lr": lr}
        return found | {"longer": True} if self.longer else found


WEIGHT = Knob("forget_weight", 0.03, 3.0)
INNER = Knob("inner_lr", 0.02, 1.0)
PLAIN = (("inner_lr", 0.0), ("gradient", "first_order"))
ALIGNED = (("inner_lr", 0.1), ("relative_inner_lr", True))
GENTLE, SAME = (("forget_weight", 0.2),), (("forget_weight", 1.0),)
PUBLISHED = PLAIN + SAME  # both losses with the same weight, as locuslab/open-unlearning has them
MOMENTUM = (("momentum", 0.675),)  # the publication's

ARMS = {
    "lur": Arm("lur", ALIGNED + SAME, (WEIGHT, INNER), "novice", rate=4.0),
    "joint": Arm("lur", PLAIN + SAME, (WEIGHT,), "novice", rate=4.0),
    "lur_core": Arm("lur", ALIGNED + SAME, (WEIGHT, INNER), "novice", CORE, rate=4.0),
    "lur_strangers": Arm("lur", ALIGNED + GENTLE, (WEIGHT, INNER), "strangers"),
    "lur_bounded": Arm("lur", ALIGNED + GENTLE, (WEIGHT, INNER), "bounded"),
    "lur_npo": Arm("lur", ALIGNED + GENTLE, (WEIGHT, INNER), "npo"),
    "mox": Arm("mox", (), (Knob("retain_limit", 0.005, 0.5),)),
    "mox_momentum": Arm("mox", MOMENTUM, (Knob("retain_limit", 0.005, 0.5),)),
    "mox_refusals": Arm("mox", (("target", "preferred"),), (Knob("retain_limit", 0.005, 0.5),), None, REFUSALS),
    "gradient_difference": Arm("lur", PUBLISHED, (WEIGHT,), "ascent"),
    "kl": Arm("lur", PUBLISHED, (WEIGHT,), "kl"),
    "npo": Arm("lur", PUBLISHED, (WEIGHT,), "npo"),
    "simnpo": Arm("lur", (*PLAIN, ("forget_weight", 0.125)), (WEIGHT,), "simnpo"),  # the published weight too
    "dpo": Arm("lur", PUBLISHED, (WEIGHT,), "dpo", REFUSALS),
    "idk": Arm("lur", PUBLISHED, (WEIGHT,), "idk", REFUSALS),
    "rmu": Arm("lur", PUBLISHED, (WEIGHT,), "rmu"),
    "collapse": Arm("lur", PUBLISHED, (WEIGHT,), "collapse"),
    "fine_tune": Arm("fine_tune"),
}
# More tries for the field's methods, each under a name with a suffix: with the rate of `lur` and as many steps more as
# its novice has updates; for what goes too far by itself at less than half of the common rate; and MOX as published.
MATCHED = ("lur_bounded", "mox", "gradient_difference", "kl", "npo", "simnpo", "dpo", "idk", "rmu")
SLOWER = ("gradient_difference", "kl", "npo")
SUFFIXES = ("_matched", "_slower", "_published")
ARMS |= {f"{name}_matched": replace(ARMS[name], rate=ARMS["lur"].rate, longer=True) for name in MATCHED}
ARMS |= {f"{name}_slower": replace(ARMS[name], rate=0.4) for name in SLOWER}
ARMS["mox_published"] = replace(ARMS["mox"], recipe=(("alpha", 4.0),), rate=0.2)
ESSENTIAL = ("lur", "joint", "mox", "gradient_difference")


def options(arm: Arm, config: dict[str, Any], known: Known) -> dict[str, Any]:
    """Arguments of `unlearn` from plain JSON."""
    found: dict[str, Any] = {"method": METHODS[arm.method](**config["method"]), "lr": config["lr"]}
    return found if config["losses"] is None else found | LOSSES[config["losses"]](known)
