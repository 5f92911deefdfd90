"""The vector operations of a step, as the rest of the package calls them."""

from fastlur.reference import (
    BETA2,
    CLIP,
    CONTROL,
    COUNT,
    EPS,
    HYPER,
    LR,
    MOMENTUM,
    OK,
    SCALE,
    WEIGHT_DECAY,
    displace,
    grad_dot,
    meta_update,
    step_control,
)

__all__ = [
    "BETA2",
    "CLIP",
    "CONTROL",
    "COUNT",
    "EPS",
    "HYPER",
    "LR",
    "MOMENTUM",
    "OK",
    "SCALE",
    "WEIGHT_DECAY",
    "displace",
    "grad_dot",
    "meta_update",
    "step_control",
]
