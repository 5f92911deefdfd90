"""Membership attacks on what a model said: functions of numbers alone, no model in sight."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastlur.errors import ArgumentError
from fastlur.world import borrowed_random

HOST = torch.device("cpu")
SPREAD = 1e-3  # log-odds; the least standard deviation that a Gaussian is fitted with


@borrowed_random(HOST)  # from which the import of scikit-learn draws
def membership(member: np.ndarray, stranger: np.ndarray, asked: np.ndarray) -> float:
    """Share of `asked`, percent, that an attack trained on `member` against `stranger` calls a stranger.

    Each is one number an item, shape (n,), such as the confidence of a model in the true class. Both sides weigh the
    same in training, whatever their sizes. Where both sides are alike, as where all of both have one and the same
    number, there is nothing to learn, and each item is called by the toss of a coin: 50.
    """
    from sklearn.linear_model import LogisticRegression  # here: a step needs none of it

    x = np.concatenate([member, stranger])[:, None].astype(np.float64)
    y = np.concatenate([np.ones(len(member)), np.zeros(len(stranger))])
    if x.min() == x.max():
        return 50.0
    mean, spread = x.mean(), max(float(x.std()), 1e-12)
    attack = LogisticRegression(class_weight="balanced").fit((x - mean) / spread, y)
    if abs(float(attack.coef_[0, 0])) < 1e-6:  # both sides alike: which way it then calls is rounding
        return 50.0
    called = attack.predict((asked[:, None].astype(np.float64) - mean) / spread)
    return 100 * float((called == 0).mean())


@borrowed_random(HOST)  # from which the import of scikit-learn draws
def auc(lower: np.ndarray, higher: np.ndarray) -> float:
    """Probability that a value of `higher` exceeds one of `lower`, ties counted half."""
    from sklearn.metrics import roc_auc_score

    truth = np.concatenate([np.zeros(len(lower)), np.ones(len(higher))])
    return float(roc_auc_score(truth, np.concatenate([lower, higher])))


def auc_interval(lower: np.ndarray, higher: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """DeLong's confidence interval of `auc`: normal, from the variance of each value's share of won pairs.

    Cut off at 0 and 1; (0, 1), that is nothing, where a side has fewer than two values. Where the sides do not overlap
    at all the variance it estimates is 0, and the interval a point: read it as "no pair was found", not as certainty.

    Source: DeLong, DeLong & Clarke-Pearson, Biometrics 44 (1988); the O(n log n) form by ranks of Sun & Xu, IEEE Signal
    Processing Letters 21 (2014).
    """
    if min(len(lower), len(higher)) < 2:
        return 0.0, 1.0
    among = _ranks(np.concatenate([lower, higher]))
    lost = 1 - (among[: len(lower)] - _ranks(lower)) / len(higher)  # share of pairs in which this one is the lower
    won = (among[len(lower) :] - _ranks(higher)) / len(lower)
    error = np.sqrt(lost.var(ddof=1) / len(lower) + won.var(ddof=1) / len(higher))
    centre, half = won.mean(), NormalDist().inv_cdf(0.5 + level / 2) * error
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def likelihood_ratio(asked: ArrayLike, shadows: ArrayLike, inside: ArrayLike, *, pooled: bool = True) -> np.ndarray:
    """LiRA's score of each item; the larger, the more like a member.

    Each item has a Gaussian of the log-odds that shadow models without it give, and one of those with it where some
    have it. Online, with both: the log of the ratio of their densities at the log-odds asked about. Offline, for items
    that no shadow was trained on: −log P(a model without it is as sure as that or surer).

    Source: Carlini et al., "Membership Inference Attacks From First Principles", arXiv 2112.03570.

    Args:
        asked: log-odds of the true class under the model attacked, shape (n,).
        shadows: the same under each shadow model, shape (models, n).
        inside: bool, whether that shadow was trained on that item, shape (models, n).
        pooled: one variance for all items (and one for each side), as advised for few shadows; False: each item its
            own, which takes two shadows a side at least, and more to be of use.

    Returns:
        Scores, shape (n,), float64. Either all items are scored online or all offline, so that they compare.

    Raises:
        ArgumentError: shapes that do not fit, or an item without shadows to compare it with.
    """
    said, models, has = np.asarray(asked, float), np.asarray(shadows, float), np.asarray(inside, bool)
    if said.ndim != 1 or models.ndim != 2 or models.shape != has.shape or models.shape[1:] != said.shape:
        raise ArgumentError(
            f"shadows: shapes {said.shape}, {models.shape} and {has.shape} of what was asked, the shadows and their "
            "membership; they must be (n,), (models, n) and (models, n)"
        )
    needed = 1 if pooled else 2
    online = bool(has.any())
    for side, word in ((~has, "without"), (has, "with"))[: 1 + online]:
        short = int((side.sum(0) < needed).sum())
        if short:
            raise ArgumentError(
                f"shadows: {short} of {len(said)} items have fewer than {needed} shadow models {word} them; train more"
                + ("" if word == "without" else ", or leave these items out of all of them")
            )
    out_mean, out_spread = _gaussian(models, ~has, pooled)
    if not online:
        surer = torch.special.log_ndtr(torch.from_numpy((out_mean - said) / out_spread))
        offline: np.ndarray = -surer.numpy()
        return offline
    in_mean, in_spread = _gaussian(models, has, pooled)
    ratio: np.ndarray = _log_density(said, in_mean, in_spread) - _log_density(said, out_mean, out_spread)
    return ratio


def _log_density(x: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Of a Gaussian, less ½ log 2π."""
    density: np.ndarray = -0.5 * ((x - mean) / spread) ** 2 - np.log(spread)
    return density


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of each value among all, from 1; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _gaussian(values: np.ndarray, chosen: np.ndarray, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the chosen values of each column; `pooled`: one deviation, about those means."""
    count = chosen.sum(0)
    mean = np.where(chosen, values, 0).sum(0) / count
    squares = np.where(chosen, (values - mean) ** 2, 0).sum(0)
    freedom = count - 1
    variance = np.full_like(mean, squares.sum() / max(freedom.sum(), 1)) if pooled else squares / freedom
    return mean, np.sqrt(variance).clip(min=SPREAD)


@dataclass(frozen=True)
class LikelihoodRatio:
    """What a likelihood-ratio attack found.

    Attributes:
        scores: one an item, in the order of the data, shape (n,); the larger, the more like a member.
        online: whether shadows trained with the items took part.
        shadows: how many shadow models there were.
        reference: what the same attack finds on the reference; None without one.
    """

    scores: np.ndarray
    online: bool
    shadows: int
    reference: LikelihoodRatio | None = None

    def auc(self, members: ArrayLike) -> float:
        """Probability that a member scores above a stranger; `members` is bool, shape (n,)."""
        truth = self._truth(members)
        return auc(self.scores[~truth], self.scores[truth])

    def auc_interval(self, members: ArrayLike, level: float = 0.95) -> tuple[float, float]:
        """DeLong's interval of it."""
        truth = self._truth(members)
        return auc_interval(self.scores[~truth], self.scores[truth], level)

    def gap(self, members: ArrayLike) -> float:
        """|AUC − the reference's|, in [0, 1].

        Raises:
            ArgumentError: there was no reference.
        """
        if self.reference is None:
            raise ArgumentError("reference: there is none; pass a retrained model to likelihood_ratio_attack")
        return abs(self.auc(members) - self.reference.auc(members))

    def true_positives(self, members: ArrayLike, false_positives: float = 0.01) -> float:
        """Share of members called members, where at most this share of strangers is; both in [0, 1]."""
        truth = self._truth(members)
        strangers = np.sort(self.scores[~truth])[::-1]
        allowed = int(np.floor(false_positives * len(strangers) + 1e-9))
        border = -np.inf if allowed >= len(strangers) else strangers[allowed]
        return float((self.scores[truth] > border).mean())

    def _truth(self, members: ArrayLike) -> np.ndarray:
        truth = np.asarray(members, bool)
        if truth.shape != self.scores.shape or truth.all() or not truth.any():
            raise ArgumentError(f"members: must be {self.scores.shape} truth values of which some are true, some false")
        return truth
