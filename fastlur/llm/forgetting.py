"""Forget losses of language models, and the retain loss that keeps to the model as given.

    fastlur.unlearn(model, forget, retain, forget_loss=fastlur.llm.NPO(beta=0.1))

All are functions `(model, batch) -> scalar`, for any method that takes a forget loss and for `MetaStep`. Those that
compare with the model as given make their reference once, before the first step, of the model as it is then: a run that
is resumed makes the same one again. Called before, so that data and model can be tried, they compare with the model as
it is now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from fastlur.errors import ArgumentError
from fastlur.llm.likelihood import causal_cross_entropy, likelihood, shifted
from fastlur.llm.preferred import preferred_of
from fastlur.llm.reference import Keep, Reference, ReferenceLogProbs, check_keep, given_log_probs
from fastlur.losses import IGNORED, relative_entropy
from fastlur.methods.base import check_range
from fastlur.microbatch import alike
from fastlur.passes import Passes


def _check(beta: object, reference: object = None) -> None:
    check_range("beta", beta, low=1e-6, example=0.1)
    if reference is not None and not isinstance(reference, ReferenceLogProbs):
        kind = type(reference).__name__
        raise ArgumentError(
            f"reference: a {kind} is none; make it with fastlur.llm.reference_log_probs, or leave it None"
        )


def _risen(model: Any, batch: Any, reference: ReferenceLogProbs | None) -> Tensor:
    """log p_θ/p_ref of each answer, shape (items,)."""
    found = likelihood(model, batch).log_probs
    return found - (found.detach() if reference is None else reference.of(batch))


@dataclass(frozen=True)
class NPO:
    """Negative preference optimisation: (2/β) · mean log(1 + (p_θ/p_ref)^β) over the answers, shape ().

    p is the probability of the whole answer. As it falls below that of the reference, its gradient fades: unlike plain
    ascent this is bounded below, by 0. At the reference the loss is (2/β) log 2 and its gradient that of mean log p_θ,
    whatever β; as β → 0 it has that gradient everywhere.

    The reference's log-probabilities of all forget answers are taken once, before the first step, and no second model
    is held.

    Source: arXiv 2404.05868; the formula as in locuslab/open-unlearning.

    Args:
        beta: β ≥ 1e-6.
        reference: log-probabilities from elsewhere; None: of the model as given.

    Raises:
        ArgumentError: a value out of range. DataError, when called: see `likelihood` and `ReferenceLogProbs.of`.
    """

    beta: float = 0.1
    reference: ReferenceLogProbs | None = None

    def __post_init__(self) -> None:
        _check(self.beta, self.reference)

    def prepare(self, passes: Passes) -> NPO:
        """With the reference, unless there is one."""
        return self if self.reference is not None else replace(self, reference=given_log_probs(passes))

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """See the class."""
        return 2 / self.beta * functional.softplus(self.beta * _risen(model, batch, self.reference)).mean()


@dataclass(frozen=True)
class SimNPO:
    """NPO without a reference, by length: −(2/β) · mean log σ(−(β/|y|) log p_θ(y) − γ), shape ().

    |y| is the number of tokens of the answer that count.

    Source: arXiv 2410.07163. locuslab/open-unlearning writes γ as β·δ.

    Args:
        beta: β ≥ 1e-6.
        gamma: the margin γ ≥ 0: how far the answer is pushed below before the gradient fades.

    Raises:
        ArgumentError: a value out of range. DataError, when called: see `likelihood`.
    """

    beta: float = 2.5
    gamma: float = 0.0

    def __post_init__(self) -> None:
        _check(self.beta)
        check_range("gamma", self.gamma, example=0.1)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """See the class."""
        found = likelihood(model, batch)
        return 2 / self.beta * functional.softplus(self.beta * found.log_probs / found.tokens + self.gamma).mean()


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation, of another answer over the true one, shape ():

        −(2/β) · mean log σ(β log p_θ(other)/p_ref(other) − β log p_θ(true)/p_ref(true))

    The other answers ("I don't know", say) come in the batch: see `with_preferred`. The reference's log-probabilities
    are taken once, as by `NPO`, which this is without the first term. Two forwards a pass.

    Source: arXiv 2305.18290, there without the factor 2/β; with it, and "I don't know" as the other answer, in
    locuslab/open-unlearning and arXiv 2404.05868 (up to the 2).

    Args:
        beta: β ≥ 1e-6.
        reference: log-probabilities from elsewhere, of both answers; None: of the model as given.

    Raises:
        ArgumentError: a value out of range. DataError, when called: a batch without other answers; see also `NPO`.
    """  # noqa: D415

    beta: float = 0.1
    reference: ReferenceLogProbs | None = None

    def __post_init__(self) -> None:
        _check(self.beta, self.reference)

    def prepare(self, passes: Passes) -> DPO:
        """With the reference, unless there is one."""
        return self if self.reference is not None else replace(self, reference=given_log_probs(passes))

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """See the class."""
        other = _risen(model, preferred_of(batch), self.reference)
        true = _risen(model, batch, self.reference)
        return 2 / self.beta * functional.softplus(self.beta * (true - other)).mean()


@dataclass(frozen=True)
class IDK:
    """Mean cross-entropy of the other answers that come in the batch, in nats a token, shape (): see `with_preferred`.

    Source: the preference optimisation of TOFU, arXiv 2401.06121.

    Raises:
        DataError: when called with a batch without other answers.
    """

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """See the class."""
        return causal_cross_entropy(model, preferred_of(batch))


@dataclass(frozen=True)
class ReferenceKL:
    """A retain loss that keeps to the model as given: weight · KL(p_ref ‖ p_θ) + cross_entropy · CE, shape ().

    Means over the tokens that count, in nats; the whole distributions are compared, so that a model is needed and not
    only log-probabilities. `max_retain_loss_increase` cannot judge by it.

    Source: the KL minimisation of TOFU, arXiv 2401.06121.

    Args:
        weight: ≥ 0.
        cross_entropy: ≥ 0; the share of the ordinary retain loss.
        keep: how the reference is kept: "copy", "adapters" (a PEFT model with its adapters switched off, no copy), or
            "auto"; see `fastlur.llm.reference.Reference`.

    Raises:
        ArgumentError: a value out of range, or both weights are 0.
    """

    weight: float = 1.0
    cross_entropy: float = 0.0
    keep: Keep = "auto"

    def __post_init__(self) -> None:
        check_range("weight", self.weight, example=1.0)
        check_range("cross_entropy", self.cross_entropy, example=1.0)
        check_keep(self.keep)
        if self.weight == 0 and self.cross_entropy == 0:
            raise ArgumentError("weight=0 and cross_entropy=0: would leave nothing to minimise; give one of them")

    def prepare(self, passes: Passes) -> KeptKL:
        """With the reference."""
        return KeptKL(self, Reference(passes, self.keep))

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Compared with the model as it is now."""
        logits, targets = shifted(model, batch)
        return self.of(logits, logits.detach(), targets)

    def of(self, logits: Tensor, given: Tensor, targets: Tensor) -> Tensor:
        """Of logits and those of the reference, shape (items, tokens, words), and targets, shape (items, tokens)."""
        now, before = (functional.log_softmax(each.flatten(0, 1), dim=-1) for each in (logits, given))
        counts = targets.flatten() != IGNORED
        rows = relative_entropy(before, now)
        total = self.weight * (rows * counts).sum() / counts.sum().clamp(min=1)
        if self.cross_entropy:
            total = total + self.cross_entropy * functional.nll_loss(now, targets.flatten(), ignore_index=IGNORED)
        return total


@dataclass(frozen=True)
class KeptKL:
    """`ReferenceKL` with its reference."""

    loss: ReferenceKL
    reference: Reference

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """See there."""
        given, _ = self.reference.ask(lambda reference: shifted(alike(model, reference), batch))
        logits, targets = shifted(model, batch)
        return self.loss.of(logits, given, targets)
