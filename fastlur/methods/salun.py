"""SalUn: random labels for the salient weights only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastlur.methods.components import SaliencyMask
from fastlur.methods.relabelling import Relabelling
from fastlur.passes import Passes
from fastlur.space import Vector


@dataclass(frozen=True)
class SalUn(Relabelling):
    """Train on random wrong labels for the forget data, moving only the weights that matter to them.

    min_θ  CE(retain, true) + λ CE(forget, random) over the half of the weights with the largest |∇CE_f(θ₀)|; the others
    do not move, weight decay included. The true label is never drawn.

    Source: Fan et al., SalUn, arXiv 2310.12508.

    Args:
        forget_weight: λ ≥ 0.
        mask: which weights may move; None: all, which is the method "random_label".
        trim: see `Recipe`.

    Raises:
        ArgumentError: a value out of range.
    """

    mask: Callable[[Passes], Vector] | None = field(default=SaliencyMask(), kw_only=True)

    name: ClassVar[str] = "salun"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"cifar10": {"lr": 0.013, "epochs": 10}}
