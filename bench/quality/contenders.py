"""The methods and what each is tuned by, beside the learning rate: its one or two main knobs."""

from __future__ import annotations

from .points import Arm, Knob

FORGET_WEIGHT = Knob("forget_weight", 0.03, 3.0)
INNER = Knob("inner_lr", 0.02, 1.0)
RELATIVE = ("relative_inner_lr", True)

RETAIN_SHARE = Knob("retain_weight", 0.5, 0.98, linear=True)

ARMS: dict[str, Arm] = {
    "lur": Arm("lur", (FORGET_WEIGHT, INNER), (RELATIVE,), open=True),
    "joint": Arm("neggrad_plus", (RETAIN_SHARE,), open=True),
    "pcgrad": Arm("pcgrad", (FORGET_WEIGHT,), open=True),
    "gru": Arm("gru", (FORGET_WEIGHT, Knob("decay", 0.1, 0.95, linear=True)), open=True),
    "eupmu": Arm("eupmu", (Knob("weight_lr", 0.005, 0.5), Knob("decay", 0.001, 0.1)), open=True),
    "scissorhands": Arm(
        "scissorhands", (Knob("forget_weight", 0.01, 1.0), Knob("trim", 0.9, 1.0, linear=True)), open=True, trim="own"
    ),
    "selective_amnesia": Arm(
        "selective_amnesia", (Knob("fisher_weight", 0.1, 1000), Knob("retain_weight", 0.3, 3)), open=True
    ),
    "gradient_ascent": Arm(
        "gradient_ascent", (Knob("max_norm", 0.01, 1), Knob("max_rise", 0.01, 0.5)), lr=(0.001, 0.1), open=True
    ),
    "salun": Arm("salun", (FORGET_WEIGHT, Knob("mask", 0.1, 0.9, linear=True)), mask="own"),
    "random_label": Arm("random_label", (FORGET_WEIGHT,)),
    "scrub": Arm("scrub", (Knob("max_part", 0.2, 0.9, linear=True), Knob("max_every", 2, 8, whole=True))),
    "bad_teacher": Arm("bad_teacher", (Knob("forget_weight", 0.1, 10), Knob("temperature", 0.5, 4))),
    "boundary_shrink": Arm("boundary_shrink", (FORGET_WEIGHT, Knob("epsilon", 0.05, 1))),
    "boundary_expand": Arm("boundary_expand", (FORGET_WEIGHT, Knob("row_lr", 0.001, 0.1))),
    "ltu": Arm("ltu", (Knob("forget_weight", 0.3, 10),), lr=(0.0003, 0.03)),
    "mox": Arm("mox", (Knob("retain_limit", 0.005, 0.5),), lr=(0.001, 0.1)),
    "l1_sparse": Arm("l1_sparse", (Knob("gamma", 1e-5, 1e-2),)),
    "fine_tune": Arm("fine_tune"),
    "ssd": Arm(
        "ssd", (Knob("alpha", 1, 100), Knob("dampening", 0.1, 3)), (("group", 16), ("batches", 24)), lr=None, mask=None
    ),
}
DEFAULT = "default"  # the call with three arguments
ESSENTIAL = (
    "lur",
    "joint",
    "pcgrad",
    "eupmu",
    "scissorhands",
    "salun",
    "scrub",
    "bad_teacher",
    "boundary_shrink",
    "l1_sparse",
)

# Does alignment help? One space, the same points, the same losses: only the direction differs.
ALIGNMENT: dict[str, Arm] = {
    "align-joint": Arm("lur", (FORGET_WEIGHT,), (RELATIVE, ("inner_lr", 0.0), ("gradient", "first_order")), open=True),
    "align-pcgrad": Arm("pcgrad", (FORGET_WEIGHT,), open=True, like_lur=True),
    **{
        f"align-{mode}": Arm("lur", (FORGET_WEIGHT, INNER), (RELATIVE, ("gradient", mode)), open=True)
        for mode in ("first_order", "optimistic", "secant", "exact")
    },
}

# LUR in the space that the joint loss is searched in: the same points give the same proportion of the two losses, the
# same rate and target. The joint loss's direction is shorter by retaining's share, which clipping may or may not undo.
WEIGHED: dict[str, Arm] = {
    "joint": ARMS["joint"],
    "weighed-optimistic": Arm("lur", (RETAIN_SHARE, INNER), (RELATIVE,), open=True, weighed=True),
}

# One setting for everything: which forget target may be the default, and with which settings? Nothing is tuned here.
SETTING = {"schedule": "linear", "trim": None, "mask": None, "max_grad_norm": 1.0}
TARGETS = ("bounded", "novice", "blindspot", "head")
JOINT = {"inner_lr": 0.0, "gradient": "first_order"}
# settings of the method, and of the trial
VARIATIONS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "optimistic": ({}, {}),
    "secant": ({"gradient": "secant"}, {}),
    "joint": (JOINT, {}),
    "optimistic, weight 1": ({"forget_weight": 1.0}, {}),
    "optimistic, sharpness 1.5": ({}, {"sharpness": 1.5}),
    "optimistic, weight 0.6, sharpness 1.3": ({"forget_weight": 0.6}, {"sharpness": 1.3}),
    "optimistic, weight 0.6, sharpness 1.3, temperature 2": (
        {"forget_weight": 0.6},
        {"sharpness": 1.3, "temperature": 2.0},
    ),
    "optimistic, lr 0.03": ({}, {"lr": 0.03}),
    "optimistic, no clipping": ({}, {"max_grad_norm": None}),
    "optimistic, own statistics": ({"normalize_by": "own"}, {}),
}


# How much does it matter that the forget weight is right? Two of these directions are aligned by a long inner step.
WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DIRECTIONS: dict[str, dict[str, object]] = {
    "joint": JOINT,
    "optimistic": {},
    "optimistic, 0.8": {"inner_lr": 0.8},
    "secant, 0.8": {"inner_lr": 0.8, "gradient": "secant"},
}


def candidates() -> dict[str, dict[str, object]]:
    """The configurations of the study of targets, by name."""
    named = [("novice", name, *both) for name, both in VARIATIONS.items()]
    found = [*named, *((target, "optimistic", {}, {}) for target in TARGETS if target != "novice")]
    return {f"target-{target}-{name}": _setting(target, method, **trial) for target, name, method, trial in found}


def weights() -> dict[str, dict[str, object]]:
    """The configurations of the study of forget weights, by name: a novice's answers for all."""
    return {
        f"weight-{weight:g}-{name}": _setting("novice", {"forget_weight": weight, **direction})
        for name, direction in DIRECTIONS.items()
        for weight in WEIGHTS
    }


def _setting(target: str, method: dict[str, object], **trial: object) -> dict[str, object]:
    whole = {"forget_weight": 0.3, "inner_lr": 0.1, "relative_inner_lr": True, "normalize_by": "retain"}
    return {"method": whole | method, "target": target, "lr": 0.1, **SETTING, **trial}
