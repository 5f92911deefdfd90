"""Whole runs to the same gap: LUR against ScissorHands, from the call to the model, everything in between included.

Wrong labels of some images were memorised and are to be forgotten; the gap is the mean distance to a network retrained
without them. Every arm is run at several lengths and learning rates, the same number of each, from the same trained
model. The gaps to be reached are the smallest of either side and some round figures; an arm's time is that of its
quickest setting that comes as near.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlur
from fastlur.losses import BoundedForgetting, negative_cross_entropy
from fastlur.methods import METHODS

Data = tuple[Tensor, Tensor]
Run = Mapping[str, Any]  # arm, length, rate, seed, gap, seconds
PUBLISHED, CLEANED = "scissorhands, as published", "scissorhands, cleaned"
LUR, LUR_BF16, CLEANED_BF16 = "lur, optimistic", "lur, optimistic, bf16", "scissorhands, cleaned, bf16"
BOUNDED = (
    "scissorhands, cleaned, bounded ascent"  # the loss of LUR's arms; the others climb without an end, as published
)
NOVICE = "lur, optimistic, as it comes"  # which trains a novice first, and imitates it
FAST = {"precision": "bf16", "memory_format": torch.channels_last}
SCISSORS = {"forget_loss": negative_cross_entropy, "weight_decay": 5e-4}
# what it is called: how `unlearn` is called, and the learning rate that was published or is the default
ARMS: dict[str, tuple[dict[str, Any], float]] = {
    PUBLISHED: ({"method": METHODS["scissorhands"](form="as_published"), **SCISSORS}, 5e-3),
    CLEANED: ({"method": METHODS["scissorhands"](), **SCISSORS}, 5e-3),
    BOUNDED: ({"method": METHODS["scissorhands"](), **SCISSORS, "forget_loss": BoundedForgetting()}, 5e-3),
    CLEANED_BF16: ({"method": METHODS["scissorhands"](), **SCISSORS, **FAST}, 5e-3),
    LUR: ({"method": fastlur.LUR(), "forget_loss": BoundedForgetting()}, 1e-1),
    LUR_BF16: ({"method": fastlur.LUR(), "forget_loss": BoundedForgetting(), **FAST}, 1e-1),
    NOVICE: ({"method": fastlur.LUR()}, 1e-1),
}


@dataclass(frozen=True)
class Job:
    """A trained model, what it is to forget and to keep, and the figures of the one retrained without the former."""

    model: nn.Module
    forget: Data
    retain: Data
    test: Data
    truth: nn.Module

    def figures(self, model: nn.Module) -> dict[str, float | None]:
        """What `evaluate` says of a model, in percent and points."""
        data = {"forget": self.forget, "retain": self.retain, "test": self.test}
        found = fastlur.evaluate(model, **data, reference=fastlur.evaluate(self.truth, **data))
        names = ("ua", "ra", "ta", "mia", "gap")
        return {name: None if (v := getattr(found, name)) is None else round(v, 3) for name in names}


def mislabelled(data: Data, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of which a share is wrong, and which ones those are."""
    generator = torch.Generator().manual_seed(seed)
    labels = data[1]
    gone = torch.zeros(len(labels), dtype=torch.bool)
    gone[torch.randperm(len(labels), generator=generator)[: int(share * len(labels))]] = True
    wrong = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    return torch.where(gone, wrong, labels), gone


def run(
    job: Job, arm: str, rate: float, times: int = 1, wait: Callable[[], None] = lambda: None, **length: float
) -> dict[str, Any]:
    """One setting of an arm from the trained model; its seconds are those of `unlearn` as a whole, of the last time.

    Args:
        job: what is to be done.
        arm: a key of `ARMS`.
        rate: the learning rate as a multiple of the arm's own.
        times: how often it is run; the first time may choose algorithms and compile kernels.
        wait: until the device has done everything.
        **length: `steps` or `epochs`, and what else the call takes, the same for every arm.
    """
    options, lr = ARMS[arm]
    spent = []
    for _ in range(times):
        model = copy.deepcopy(job.model)
        wait()
        began = time.perf_counter()
        result = fastlur.unlearn(model, job.forget, job.retain, lr=rate * lr, progress=False, **options, **length)
        wait()
        spent.append(time.perf_counter() - began)
        if spent[0] > 5:
            break
    return {
        "arm": arm,
        "rate": rate,
        "steps": len(result.history["retain_loss"]),
        "seconds": round(spent[-1], 4),
        "all_seconds": [round(each, 4) for each in spent],
        "after": (after := job.figures(model)),
        "gap": after["gap"],
    }


def verdict(runs: Sequence[Run], best_of: Sequence[str], gaps: Sequence[float] = (5.0, 2.0, 1.0)) -> dict[str, Any]:
    """How long every arm takes to come within several gaps, in seconds; None where no setting of its does.

    Gaps and seconds of a setting are means over the runs that differ in their seed only; "each" has the seconds of the
    setting that was quickest by seeds. To ask for the best of an arm favours the others, since an arm's best is often
    its longest run: hence that of both sides, and fixed gaps.

    Args:
        runs: of all arms.
        best_of: arms whose smallest gap is one to be reached.
        gaps: others, in points.
    """
    settings: dict[tuple[str, float, int], list[Run]] = {}
    for each in runs:
        settings.setdefault((each["arm"], each["rate"], each["steps"]), []).append(each)
    means: dict[str, list[tuple[float, float, list[float]]]] = {}
    for (arm, _, _), alike in settings.items():
        gap, spent = (statistics.fmean(each[what] for each in alike) for what in ("gap", "seconds"))
        means.setdefault(arm, []).append((gap, spent, [each["seconds"] for each in alike]))
    wanted = {f"the best of {arm}": min(gap for gap, _, _ in means[arm]) for arm in best_of if arm in means}
    wanted |= {f"fixed, {gap:g}": gap for gap in gaps}
    found = {}
    for label, target in wanted.items():
        near = {arm: [each[1:] for each in tried if each[0] <= target] for arm, tried in means.items()}
        quickest = {arm: min(each, default=(None, None)) for arm, each in near.items()}
        found[label] = {
            "gap": round(target, 3),
            "seconds": {arm: None if mean is None else round(mean, 4) for arm, (mean, _) in quickest.items()},
            "each": {arm: each for arm, (_, each) in quickest.items()},
        }
    return found
