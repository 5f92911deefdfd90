"""Random labels: teach wrong answers for what is to be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlur.methods.relabelling import Relabelling


@dataclass(frozen=True)
class RandomLabel(Relabelling):
    """Train on random wrong labels for the forget data and on the true ones for the retain data.

    min_θ  CE(retain, true) + λ CE(forget, random), a wrong label being drawn for every item of every batch.

    Source: the relabelling baseline that SalUn (arXiv 2310.12508) builds on. There the labels are drawn from all
    classes; here the true one is left out, so that no draw teaches it.

    Args:
        forget_weight: λ ≥ 0.

    Raises:
        ArgumentError: a value out of range.
    """

    name: ClassVar[str] = "random_label"
