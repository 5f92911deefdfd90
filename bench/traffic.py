"""What an operation reads and writes, in elements of float32, every operand counted once."""

TRAFFIC = {
    "grad_dot": 2,
    "displace": 3,
    "project": 3,
    "regularize": 4,
    "sgd": 6,
    "adamw": 8,
    "extrapolate": 3,
    "saliency": 3,
    "threshold": 1,
    "step_control": 3,
}
# elements that the spelling by _foreach reads and writes, temporaries too: by more than the ratio of the two, fusing
# passes cannot speed an operation up
FOREACH_TRAFFIC = {
    "grad_dot": 6,
    "displace": 5,
    "project": 3,
    "regularize": 19,
    "sgd": 14,
    "adamw": 23,
    "extrapolate": 5,
    "saliency": 7,
}
