"""Published settings of LUR by name, apart from its rule, for a ResNet-18 with the layer names of torchvision's.

Read in accounts of the publication (arXiv 2503.06339), not in it: −cross-entropy without a cap for the forget loss, the
inner step, SGD and its momentum, the length, the trims. Learning rates were 0.1, 0.05, 0.01 and 0.005, of which 0.01
stands here. The factor on the forget loss was not among them, so this package's default remains. The gradient goes
through the inner step, as there.
"""

from __future__ import annotations

import math
from typing import Any

from fastlur.losses import negative_cross_entropy
from fastlur.methods.components import Trim
from fastlur.methods.lur import LUR


def _published(sparsity: float, *layers: str) -> dict[str, Any]:
    return {
        "method": {"inner_lr": 1e-2, "gradient": "exact", "trim": Trim(sparsity, layers), "normalize_by": "own"},
        "forget_loss": negative_cross_entropy,
        "lr": 1e-2,
        "epochs": 10,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "max_grad_norm": math.inf,
    }


LUR.presets = {
    "cifar10": _published(0.97, "layer3.*", "layer4.*", "fc.*"),
    "cifar100_random10": _published(0.99, "layer4.*", "fc.*"),
    "cifar100_random50": _published(0.90, "layer4.*", "fc.*"),
}
