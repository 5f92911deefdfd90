"""What a language model still knows, measured as TOFU defines it (Maini et al., arXiv 2401.06121).

    probability   p(a|q)^(1/|a|); where only one answer of several is right, its share among them
    ROUGE-L       recall: the longest common subsequence of words, over the words of the right answer
    truth ratio   the geometric mean of p^(1/|a|) over the wrong answers, over that of the paraphrased right one:
                  near 0 where the fact is known, about 1 where it is not
    forget quality  the p-value of a two-sample Kolmogorov–Smirnov test: truth ratios on the forget set of this model
                  against those of the model that never saw it; small: they can be told apart
    utility       the harmonic mean of all three on what must stay: retained authors and general facts, where of the
                  truth ratio R it is max(0, 1 − R) that is good when large

Source: sections 2.2 and 3 of the paper; the geometric mean over wrong answers is that of the authors' published code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch.nn import functional

from .authors import Pair
from .text import Reader, answer_logits, encoded, generated, words_of

Floats = np.ndarray[Any, np.dtype[np.float64]]
BATCH = 32
DRAWS = 40


def rouge_l(right: str, said: str) -> float:
    """Recall: the share of the right answer's words that stand in what was said, in their order; in [0, 1]."""
    wanted, given = words_of(right), words_of(said)
    if not wanted:
        raise ValueError("the right answer has no words")
    row = [0] * (len(given) + 1)
    for word in wanted:
        before = row[:]
        for at, other in enumerate(given, 1):
            row[at] = before[at - 1] + 1 if word == other else max(before[at], row[at - 1])
    return row[-1] / len(wanted)


def truth_ratio(right: Floats, wrong: Floats) -> Floats:
    """The truth ratio R ≥ 0 of every question.

    Args:
        right: mean log-probability of a token of the paraphrased right answer, in nats, shape (questions,).
        wrong: likewise of the wrong ones, shape (questions, answers).
    """
    return np.exp(wrong.mean(1) - right)


def forget_quality(ratios: Sequence[float] | Floats, truth: Sequence[float] | Floats) -> float:
    """The p-value in [0, 1] of the hypothesis that both samples of truth ratios are of one distribution."""
    with warnings.catch_warnings():  # where the exact distribution cannot be had, the asymptotic one serves
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ks_2samp(ratios, truth).pvalue)


def remembered(known: Sequence[float], unknown: Sequence[float], truth: Sequence[float], level: float) -> int:
    """How many questions a model must still know for the test to see it, at that level and in more than half of draws.

    Args:
        known: truth ratios of the model before unlearning.
        unknown: of one that never saw the forget set; so many of its ratios, drawn at random, are replaced by `known`.
        truth: what is compared with.
        level: p below this is a rejection.

    Returns:
        The least number, or one more than there are questions.
    """
    draw, known_, unknown_ = np.random.default_rng(0), np.asarray(known), np.asarray(unknown)
    for count in range(len(known_) + 1):
        seen = 0
        for _ in range(DRAWS):
            mixed, chosen = unknown_.copy(), draw.permutation(len(known_))[:count]
            mixed[chosen] = known_[chosen]
            seen += forget_quality(mixed, truth) < level
        if seen > DRAWS / 2:
            return count
    return len(known_) + 1


def harmonic_mean(values: Iterable[float]) -> float:
    """0 where a value is 0."""
    known = list(values)
    return 0.0 if min(known) <= 0 else len(known) / sum(1 / value for value in known)


def utility(parts: Mapping[str, Mapping[str, float]]) -> float:
    """The harmonic mean over all sets and metrics, in [0, 1]; `parts` are what `summary` gives, by set."""
    return harmonic_mean(value for part in parts.values() for value in part.values())


def summary(probability: Floats, rouge: Floats, ratios: Floats) -> dict[str, float]:
    """The means of a set that is to be kept: each in [0, 1], and the more the better."""
    kept = np.maximum(0.0, 1.0 - ratios)
    parts = (("probability", probability), ("rouge", rouge), ("truth", kept))
    return {name: float(np.mean(value)) for name, value in parts}


@torch.no_grad()
def mean_log_probs(model: Any, reader: Reader, asked: Sequence[tuple[str, str]], batch_size: int = BATCH) -> Floats:
    """log p(a|q)/|a| in nats of every (question, answer), shape (pairs,): the answer's tokens without the end's.

    Pairs are run by length, so that little is padded; the model's mode comes back as it was.
    """
    order = sorted(range(len(asked)), key=lambda at: len(asked[at][0]) + len(asked[at][1]))
    training, found = model.training, np.empty(len(asked))
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            few = order[at : at + batch_size]
            logits, tokens, items = answer_logits(model, encoded(reader, [asked[each] for each in few], end=False))
            logs = -functional.cross_entropy(logits, tokens, reduction="none").double()
            sums = torch.zeros(len(few), dtype=torch.float64).index_add_(0, items, logs)
            found[few] = (sums / torch.bincount(items, minlength=len(few))).numpy()
    finally:
        model.train(training)
    return found


def judged(model: Any, reader: Reader, pairs: Sequence[Pair], most: int = 24, again: bool = True) -> dict[str, Floats]:
    """Everything about a set of questions, an array of shape (questions,) each.

    Args:
        model: a causal language model of transformers; its mode comes back as it was.
        reader: its own.
        pairs: with equally many wrong answers.
        most: tokens of a generated answer.
        again: ask in other words too.

    Returns:
        "probability" of the answer; "choice", the share of the paraphrased right answer's among all that are offered,
        which is what counts for general facts; "rouge" of the greedy answer; "ratio", the truth ratio; "known" and, if
        asked, "again": the ROUGE recall of the value alone, to the question and to the question in other words.
    """
    count, wrong = len(pairs), len(pairs[0].wrong_answers)
    asked = [(pair.question, pair.answer) for pair in pairs]
    asked += [(pair.question, pair.paraphrased_answer) for pair in pairs]
    asked += [(pair.question, each) for pair in pairs for each in pair.wrong_answers]
    logs = mean_log_probs(model, reader, asked)
    own, right, others = logs[:count], logs[count : 2 * count], logs[2 * count :].reshape(count, wrong)
    said = generated(model, reader, [pair.question for pair in pairs], most)
    offered = np.exp(np.concatenate((right[:, None], others), 1))
    found = {
        "probability": np.exp(own),
        "choice": offered[:, 0] / offered.sum(1),
        "rouge": np.array([rouge_l(pair.answer, text) for pair, text in zip(pairs, said, strict=True)]),
        "ratio": truth_ratio(right, others),
        "known": np.array([rouge_l(pair.value, text) for pair, text in zip(pairs, said, strict=True)]),
    }
    if again:
        said = generated(model, reader, [pair.paraphrased_question for pair in pairs], most)
        found["again"] = np.array([rouge_l(pair.value, text) for pair, text in zip(pairs, said, strict=True)])
    return found
