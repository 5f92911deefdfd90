"""Did it forget, did it keep, and can an attacker tell? The field's metrics, against a retrained reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from fastlur.data import source, to_device
from fastlur.errors import ArgumentError, DataError, FastlurError, ModelError
from fastlur.losses import IGNORED, logits_and_targets
from fastlur.world import borrowed_random, mode

GAP = ("ua", "ra", "ta", "mia")


@dataclass(frozen=True)
class Evaluation:
    """How a model stands after (or before) unlearning.

    Attributes:
        ua: unlearning accuracy, 100 − accuracy on the forget set, percent.
        ra: accuracy on the retain set, percent.
        ta: accuracy on the test set, percent.
        mia: share of the forget set, in percent, that a membership attack calls "not a member": a logistic regression
            on the confidence in the true class, trained to tell retain (member) from test (non-member).
        loss_auc: probability that a test item has a larger loss than a forget item, in [0, 1]; ½ means that the loss
            does not tell them apart, more that the forget items still look like training data. No threshold, no attack
            to train. (Where forget and test are of different classes, compare with the reference, not with ½.)
        gap: mean |metric − the reference's| over ua, ra, ta and mia, in percentage points; None without a reference.
            Measured against a model retrained without the forget set this is what counts: a large ua by itself is not
            success.
    """

    ua: float
    ra: float
    ta: float
    mia: float
    loss_auc: float
    gap: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """The metrics by name, as plain numbers."""
        return asdict(self)

    def __str__(self) -> str:
        gap = "" if self.gap is None else f"  gap {self.gap:.2f}"
        return (
            f"UA {self.ua:.1f}  RA {self.ra:.1f}  TA {self.ta:.1f}  MIA {self.mia:.1f}  "
            f"loss-AUC {self.loss_auc:.3f}{gap}"
        )


def evaluate(
    model: nn.Module,
    *,
    forget: Any,
    retain: Any,
    test: Any,
    reference: nn.Module | Evaluation | None = None,
    batch_size: int = 512,
) -> Evaluation:
    """Measure a classifier on forget, retain and test data, in eval mode, without touching anything of it.

    Args:
        model: the classifier; its output (or its `.logits`) is of shape (*targets.shape, classes).
        forget: what was to be forgotten, labelled data as `unlearn` takes them.
        retain: what was to be kept, likewise.
        test: data that no model was trained on, likewise.
        reference: a model retrained without the forget set, or its `Evaluation`; gives `gap`.
        batch_size: for data that do not come in batches.

    Raises:
        DataError: data of an unknown kind, empty, or not fitting the model.
        ArgumentError: `reference` is neither a model nor an `Evaluation`.
    """
    scores = [
        _scores(model, data, name, batch_size)
        for data, name in ((forget, "forget"), (retain, "retain"), (test, "test"))
    ]
    (forget_p, forget_hit, forget_loss), (retain_p, retain_hit, _), (test_p, test_hit, test_loss) = scores
    against = np.concatenate([np.zeros(len(forget_loss)), np.ones(len(test_loss))])
    result = Evaluation(
        ua=100 - 100 * float(forget_hit.mean()),
        ra=100 * float(retain_hit.mean()),
        ta=100 * float(test_hit.mean()),
        mia=membership(retain_p, test_p, forget_p),
        loss_auc=float(roc_auc_score(against, np.concatenate([forget_loss, test_loss]))),
    )
    if reference is None:
        return result
    if isinstance(reference, nn.Module):
        reference = evaluate(reference, forget=forget, retain=retain, test=test, batch_size=batch_size)
    if not isinstance(reference, Evaluation):
        raise ArgumentError(f"reference: a {type(reference).__name__} is neither a model nor an Evaluation")
    gap = sum(abs(getattr(result, name) - getattr(reference, name)) for name in GAP) / len(GAP)
    return Evaluation(**{**result.as_dict(), "gap": gap})


def membership(member: np.ndarray, stranger: np.ndarray, asked: np.ndarray) -> float:
    """Share of `asked`, percent, that an attack trained on `member` against `stranger` calls a stranger.

    Each is the confidences of a model in the true class, shape (n,). Both sides weigh the same in training, whatever
    their sizes.
    """
    x = np.concatenate([member, stranger])[:, None].astype(np.float64)
    y = np.concatenate([np.ones(len(member)), np.zeros(len(stranger))])
    mean, spread = x.mean(), max(float(x.std()), 1e-12)
    attack = LogisticRegression(class_weight="balanced").fit((x - mean) / spread, y)
    called = attack.predict((asked[:, None].astype(np.float64) - mean) / spread)
    return 100 * float((called == 0).mean())


def _scores(model: nn.Module, data: Any, name: str, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence in the true class, hit or miss, and loss in nats, one entry an item (a target that counts)."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: a {type(model).__name__} is no torch.nn.Module")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size!r} must be a positive whole number")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts: list[Tensor] = []
    with mode(model, False), torch.no_grad(), borrowed_random(device):
        for batch in source(data, name, batch_size).once():
            try:
                logits, targets = logits_and_targets(model, to_device(batch, device))
            except FastlurError:
                raise
            except Exception as error:
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(f"{name}: the model cannot take a batch ({type(error).__name__}: {said})") from error
            parts.append(_each(logits, targets.long(), name))
    if not parts or not sum(part.shape[1] for part in parts):
        raise DataError(f"{name}: is empty; pass at least one labelled item")
    confidence, hit, loss = torch.cat(parts, dim=1).cpu().numpy()
    return confidence, hit, loss


def _each(logits: Tensor, targets: Tensor, name: str) -> Tensor:
    """The three rows of `_scores` for one batch; targets of −100 do not count."""
    counted = targets != IGNORED
    logits, targets = logits[counted].double(), targets[counted]
    classes = logits.shape[-1]
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        raise DataError(f"{name}: holds labels outside the model's {classes} logits; labels go from 0 to {classes - 1}")
    loss = functional.cross_entropy(logits, targets, reduction="none")
    if not bool(torch.isfinite(loss).all()):
        raise DataError(f"{name}: the loss of an item is not finite; look for NaN in the data or the model")
    return torch.stack((torch.exp(-loss), (logits.argmax(-1) == targets).double(), loss))
