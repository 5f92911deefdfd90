"""Unlearning inversion: what the difference of the weights before and after gives away about the forgotten items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlur.attacks import auc, auc_interval
from fastlur.audit.items import count as items_of
from fastlur.audit.items import device_of, gather, own_copy, rows, whole
from fastlur.audit.matching import Matching, alignments, noise_like
from fastlur.errors import ArgumentError, DataError, ModelError, finite, told
from fastlur.losses import logits_and_targets, split
from fastlur.result import Result
from fastlur.world import borrowed_random, derive, passing, seed_torch

DIRECTIONS = 20  # random ones that recognition is compared with


@dataclass(frozen=True)
class Inversion:
    """What an attacker learns who holds the weights before and after.

    Attributes:
        moved: norm of the difference over that of the weights before.
        label: the class whose output the change pushed down most, the guess at what was forgotten; None where no last
            layer was found, or it did not move.
        label_right: share of the forget items of that class, in [0, 1].
        label_chance: share of the other items of that class: what the guess is worth where nothing was given away.
        label_auc: probability that the class of a forget item was pushed down more than that of another item; ½: it
            tells nothing.
        alignment: mean cosine between the change and the gradient of a forget item's loss at the weights before.
        alignment_others: the same of the other items.
        alignment_auc: probability that a forget item's is the larger: may candidates be told apart? ½: no.
        alignment_interval: DeLong's 95 % interval of it.
        alignment_noise: the largest difference of the two means among 20 random directions. The probability alone
            would mislead: gradients of two kinds of items differ in what a random direction sees as well.
        match: cosine between the change and the gradient of the reconstructions, which were sought to make it large.
        match_noise: what the search reaches for random directions of the same norm per tensor.
        similarity: how much a forget item looks like the reconstruction next to it, in [−1, 1]: cosine less the mean
            item; mean over the forget items.
        similarity_others: the same for the other items.
        similarity_noise: for the forget items and reconstructions from random directions.
        similarity_auc: probability that a forget item looks more like a reconstruction than another item does.
        similarity_interval: DeLong's 95 % interval of it.
        reconstructions: shape (count, *item).
    """

    moved: float
    label: int | None
    label_right: float | None
    label_chance: float | None
    label_auc: float | None
    alignment: float
    alignment_others: float
    alignment_auc: float
    alignment_interval: tuple[float, float]
    alignment_noise: float
    match: float
    match_noise: float
    similarity: float
    similarity_others: float
    similarity_noise: float
    similarity_auc: float
    similarity_interval: tuple[float, float]
    reconstructions: Tensor

    __hash__ = None  # type: ignore[assignment]  # it holds a tensor

    @property
    def tells_items(self) -> bool:
        """Whether candidates can be told apart by the change."""
        ahead = self.alignment - self.alignment_others
        return ahead > self.alignment_noise and _clear(self.alignment_auc, self.alignment_interval)

    @property
    def shows_items(self) -> bool:
        """Whether reconstructions look more like forget items than like others, and than those from noise do."""
        return self.similarity > self.similarity_noise and _clear(self.similarity_auc, self.similarity_interval)

    @property
    def reading(self) -> str:
        """One line."""
        if not self.moved:
            return "the weights are the same; there is nothing to see"
        label = "no label was guessed"
        if self.label is not None and self.label_right is not None and self.label_chance is not None:
            label = f"class {self.label} was guessed, right for {100 * self.label_right:.0f} % of the forget items "
            label += f"(chance {100 * self.label_chance:.0f} %)"
        told = "can" if self.tells_items else "cannot"
        shown = "look" if self.shows_items else "do not look"
        return (
            f"{label}; forget items {told} be told from others by the change (AUC {self.alignment_auc:.2f}); "
            f"reconstructions {shown} like them (similarity {self.similarity:.2f}, others "
            f"{self.similarity_others:.2f}, from noise {self.similarity_noise:.2f})"
        )


def inversion(
    before: nn.Module,
    after: nn.Module | Result,
    forget: Any,
    others: Any,
    *,
    count: int = 1,
    iterations: int = 200,
    lr: float = 0.05,
    smooth: float = 1e-3,
    noises: int = 3,
    candidates: int = 100,
    seed: int = 0,
) -> Inversion:
    """Attack the change of the weights: guess the label, recognise the items among candidates, reconstruct them.

    To first order the change d = θ_after − θ_before is made of gradients of the forgotten items' loss at θ_before,
    climbed. Three attacks on it, each beside its baseline:

    - label: a class's output bias (or the sum of its row of the last weight) falls for the classes forgotten; the guess
      is where d is least there.
    - recognition: the cosine between d and each candidate's gradient, forget items against others.
    - reconstruction: inputs whose gradient, with the guessed labels, has the largest cosine with d, less a penalty on
      total variation, found by Adam from noise; compared with the forget items, the others, and what the same search
      finds in random directions.

    Source: in the spirit of Hu et al., "Learn What You Want to Unlearn: Unlearning Inversion Attacks against Machine
    Unlearning", arXiv 2404.03233; matching by cosine as in Geiping et al., arXiv 2003.14053. Reconstructed: neither is
    followed in detail, and a better attack may find more.

    Args:
        before: the model as it was.
        after: the same after unlearning, or the `Result`. Neither is changed.
        forget: the forgotten items, labelled; inputs are one tensor of floating-point numbers.
        others: items to compare with, likewise. Retained ones ask "which was forgotten"; unseen ones of the same class
            ask whether the items are given away or only what their class looks like.
        count: how many inputs are reconstructed together, ≥ 1.
        iterations: of the search, ≥ 1.
        lr: its step, in the width of the range of the inputs, > 0.
        smooth: weight of the total variation of images, ≥ 0.
        noises: how many random directions are searched as well, ≥ 1.
        candidates: items a side that are looked at, in the order of the data, ≥ 2 (one forget item is enough).
        seed: of where the search begins, and of the random directions.

    Raises:
        ArgumentError: a value out of range.
        ModelError: models of different kinds, or one that cannot be differentiated twice.
        DataError: data that are not labelled or not floating point, or do not fit.
    """
    for name, value, low in (("count", count, 1), ("iterations", iterations, 1), ("noises", noises, 1)):
        whole(name, value, low)
    whole("candidates", candidates, 2)
    if not (finite(lr) and lr > 0) or not (finite(smooth) and smooth >= 0):
        raise ArgumentError(f"lr={lr!r}, smooth={smooth!r}: lr must be positive and smooth ≥ 0")
    model = own_copy(before, "before")
    change = _change(model, after.model if isinstance(after, Result) else after)
    device = device_of(model)
    gone, new = (
        _floating(gather(data, name, device, derive(seed, name), candidates), name)
        for name, data in (("forget", forget), ("others", others))
    )
    with borrowed_random(device), passing(model, device, "fp32", training=False):
        seed_torch(derive(seed, "inversion"), device)
        logits = _logits(model, gone)
        classes = (targets.cpu().numpy() for targets in (split(gone)[1], split(new)[1]))
        asked, compared = (each.reshape(len(each), -1)[:, 0] for each in classes)
        pushed = pushed_down(change, logits.shape[-1])
        guessed = None if pushed is None or not pushed.any() else pushed
        directions = [change, *(noise_like(change) for _ in range(DIRECTIONS))]
        told, background = alignments(model, directions, gone), alignments(model, directions, new)
        matching = Matching(model, gone, new, iterations, lr, smooth)
        labels = _labels(guessed if guessed is not None else np.ones(logits.shape[-1]), count)
        found, match = matching.search(change, labels)
        alike, alike_others = matching.similarity(found, gone), matching.similarity(found, new)
        noise = []
        for _ in range(noises):
            seen, reached = matching.search(noise_like(change), labels)
            noise.append((reached, float(matching.similarity(seen, gone).mean())))
    label = None if guessed is None else int(guessed.argmax())
    return Inversion(
        moved=_size(change.values()) / max(_size(model.parameters()), 1e-300),
        label=label,
        label_right=None if label is None else float((asked == label).mean()),
        label_chance=None if label is None else float((compared == label).mean()),
        label_auc=None if guessed is None else auc(guessed[compared], guessed[asked]),
        alignment=float(told[:, 0].mean()),
        alignment_others=float(background[:, 0].mean()),
        alignment_auc=auc(background[:, 0], told[:, 0]),
        alignment_interval=auc_interval(background[:, 0], told[:, 0]),
        alignment_noise=float((told.mean(0) - background.mean(0))[1:].max()),
        match=match,
        match_noise=float(np.mean([reached for reached, _ in noise])),
        similarity=float(alike.mean()),
        similarity_others=float(alike_others.mean()),
        similarity_noise=float(np.mean([seen for _, seen in noise])),
        similarity_auc=auc(alike_others, alike),
        similarity_interval=auc_interval(alike_others, alike),
        reconstructions=found.cpu(),
    )


def _clear(found: float, interval: tuple[float, float]) -> bool:
    """Whether it is above ½; of a single item, which has no interval, whether it is among the first in twenty."""
    return found >= 0.95 if interval == (0.0, 1.0) else interval[0] > 0.5


def pushed_down(change: dict[str, Tensor], classes: int) -> np.ndarray | None:
    """How far each class's output was pushed down, shape (classes,): −d of the last bias, or of the last weight's rows.

    None where the model has no such tensor.
    """
    for dimensions in (1, 2):
        for value in reversed(change.values()):
            if value.dim() == dimensions and value.shape[0] == classes:
                fell: np.ndarray = -value.reshape(classes, -1).double().sum(1).cpu().numpy()
                return fell
    return None


def _labels(pushed: np.ndarray, count: int) -> Tensor:
    """`count` labels in proportion to how far the classes were pushed down."""
    left = pushed.clip(min=0) / max(pushed.clip(min=0).sum(), 1e-300)
    labels = []
    for _ in range(count):
        labels.append(int(left.argmax()))
        left[labels[-1]] -= 1 / count
    return torch.tensor(labels)


def _change(before: nn.Module, after: Any) -> dict[str, Tensor]:
    if not isinstance(after, nn.Module):
        raise ModelError(f"after: a {type(after).__name__} is no torch.nn.Module")
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    if old.keys() != new.keys() or any(old[name].shape != new[name].shape for name in old):
        raise ModelError("after: has other parameters than before; pass the same model before and after unlearning")
    return {
        name: new[name].detach().to(value.device, value.dtype) - value.detach()
        for name, value in old.items()
        if value.is_floating_point()
    }


def _floating(batch: Any, name: str) -> Any:
    inputs, _ = split(batch)
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise DataError(f"{name}: inversion needs inputs that are one tensor of floating-point numbers")
    return batch


def _logits(model: nn.Module, batch: Any) -> Tensor:
    with told(DataError, "forget: the model cannot take these items"):
        return logits_and_targets(model, rows(batch, torch.arange(min(2, items_of(batch)))))[0]


def _size(tensors: Any) -> float:
    return float(sum(float(each.detach().double().square().sum()) for each in tensors) ** 0.5)
