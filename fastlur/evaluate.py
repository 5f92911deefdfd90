"""Did it forget, did it keep, and can an attacker tell? The field's metrics, against a retrained reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from fastlur.attacks import auc, auc_interval, membership
from fastlur.errors import ArgumentError, number
from fastlur.result import Result
from fastlur.scores import scores

__all__ = ["Evaluation", "evaluate", "membership"]

GAP = ("ua", "ra", "ta", "mia")
ATTACKS = {
    "confidence": "confidence",
    "correctness": "hit",
    "entropy": "entropy",
    "modified_entropy": "modified_entropy",
}


@dataclass(frozen=True)
class Evaluation:
    """How a model stands after (or before) unlearning.

    Attributes:
        ua: unlearning accuracy, 100 − accuracy on the forget set, percent.
        ra: accuracy on the retain set, percent.
        ta: accuracy on the test set, percent.
        mia: share of the forget set, in percent, that a membership attack calls "not a member": a logistic regression
            on the confidence in the true class, trained to tell retain (member) from test (non-member); 50 where
            that is the same for all of both, so that no attack can learn anything.
        loss_auc: probability that a test item has a larger loss than a forget item, in [0, 1]; ½ means that the loss
            does not tell them apart, more that the forget items still look like training data. No threshold, no attack
            to train. (Where forget and test are of different classes, compare with the reference, not with ½.)
        gap: mean |metric − the reference's| over ua, ra, ta and mia, in percentage points; None without a reference.
            Measured against a model retrained without the forget set this is what counts: a large ua by itself is not
            success.
        loss_auc_interval: DeLong's 95 % confidence interval of `loss_auc`.
        attacks: what `mia` is, for attacks on four things a model gives away: "confidence" (`mia` itself),
            "correctness" (is the answer right), "entropy" and "modified_entropy" of the answer.
        per_class: accuracy in percent of every class that occurs, for "forget", "retain" and "test".
        seconds: what unlearning took (RTE); None where nobody said.
        gaps: |figure − the reference's| by name, such as "ua", "attacks.entropy" or "per_class.retain.3": of every
            figure above that both have, but not of `seconds` and the interval; None without a reference.
    """

    ua: float
    ra: float
    ta: float
    mia: float
    loss_auc: float
    gap: float | None = None
    loss_auc_interval: tuple[float, float] | None = None
    attacks: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: float | None = None
    gaps: dict[str, float] | None = None

    __hash__ = None  # type: ignore[assignment]  # it holds dicts

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, as JSON knows it: classes are text, the interval is a list."""
        plain = asdict(self)
        plain["per_class"] = {side: {str(c): v for c, v in every.items()} for side, every in self.per_class.items()}
        plain["loss_auc_interval"] = None if self.loss_auc_interval is None else list(self.loss_auc_interval)
        return plain

    def __str__(self) -> str:
        low_high = self.loss_auc_interval
        interval = "" if low_high is None else f" [{low_high[0]:.3f}, {low_high[1]:.3f}]"
        gap = "" if self.gap is None else f"  gap {self.gap:.2f}"
        spent = "" if self.seconds is None else f"  RTE {self.seconds:.1f} s"
        return (
            f"UA {self.ua:.1f}  RA {self.ra:.1f}  TA {self.ta:.1f}  MIA {self.mia:.1f}  "
            f"loss-AUC {self.loss_auc:.3f}{interval}{gap}{spent}"
        )


def evaluate(
    model: nn.Module | Result,
    *,
    forget: Any,
    retain: Any,
    test: Any,
    reference: nn.Module | Result | Evaluation | None = None,
    batch_size: int = 512,
    seconds: float | None = None,
) -> Evaluation:
    """Measure a classifier on forget, retain and test data, in eval mode, without touching anything of it.

    Args:
        model: the classifier; its output (or its `.logits`) is of shape (*targets.shape, classes). Or the `Result` of
            `unlearn`, whose model and seconds are taken.
        forget: what was to be forgotten, labelled data as `unlearn` takes them.
        retain: what was to be kept, likewise.
        test: data that no model was trained on, likewise.
        reference: a model retrained without the forget set (or the `Result` of that), or its `Evaluation`; gives `gap`
            and `gaps`.
        batch_size: for data that do not come in batches.
        seconds: what unlearning took, to be recorded.

    Raises:
        DataError: data of an unknown kind, empty, or not fitting the model.
        ArgumentError: `reference` is neither a model nor an `Evaluation`.
    """
    if isinstance(model, Result):
        seconds = model.seconds if seconds is None else seconds
        model = model.model
    if seconds is not None and not number(seconds):
        raise ArgumentError(f"seconds={seconds!r} must be a finite number ≥ 0, or None")
    gone = scores(model, forget, "forget", batch_size)
    kept = scores(model, retain, "retain", batch_size)
    new = scores(model, test, "test", batch_size)
    attacks = {name: membership(*(getattr(each, what) for each in (kept, new, gone))) for name, what in ATTACKS.items()}
    result = Evaluation(
        ua=100 - 100 * float(gone.hit.mean()),
        ra=100 * float(kept.hit.mean()),
        ta=100 * float(new.hit.mean()),
        mia=attacks["confidence"],
        loss_auc=auc(gone.loss, new.loss),
        loss_auc_interval=auc_interval(gone.loss, new.loss),
        attacks=attacks,
        per_class={"forget": gone.per_class(), "retain": kept.per_class(), "test": new.per_class()},
        seconds=seconds,
    )
    if reference is None:
        return result
    if isinstance(reference, nn.Module | Result):
        reference = evaluate(reference, forget=forget, retain=retain, test=test, batch_size=batch_size)
    if not isinstance(reference, Evaluation):
        raise ArgumentError(f"reference: a {type(reference).__name__} is neither a model nor an Evaluation")
    mine, theirs = _figures(result), _figures(reference)
    gaps = {name: abs(value - theirs[name]) for name, value in mine.items() if name in theirs}
    return replace(result, gap=sum(gaps[name] for name in GAP) / len(GAP), gaps=gaps)


def _figures(of: Evaluation) -> dict[str, float]:
    """Everything that can be compared with a reference, by name."""
    found = {name: getattr(of, name) for name in (*GAP, "loss_auc")}
    found |= {f"attacks.{name}": value for name, value in of.attacks.items()}
    return found | {
        f"per_class.{side}.{label}": value for side, every in of.per_class.items() for label, value in every.items()
    }
