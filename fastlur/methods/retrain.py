"""Retraining: the reference that every other method is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from fastlur.errors import ArgumentError, ModelError, check_flags, lacks_memory
from fastlur.fresh import reinitialise
from fastlur.losses import logits_and_targets
from fastlur.methods.base import Cost, Direction, Gradient, Recipe
from fastlur.passes import Passes

KNOWN = 0.5  # of the loss of guessing; no untrained model is that good


@dataclass(frozen=True)
class Retrain(Recipe):
    """Train a fresh model on the retain data alone: what the other methods try to equal.

    Rule: descend along ∇L_r, from new weights. A step is a step of `fine_tune`, bit for bit: the two differ in where
    they start, and only the start decides whether anything is left to forget. Pass a freshly made model, or let this
    method make yours fresh:

        unlearn(make_model(), forget, retain, method="retrain", epochs=40)
        unlearn(model, forget, retain, method=fastlur.methods.Retrain(reinitialise=True), epochs=40)

    That a model is fresh cannot be proven, that it is not often can: one that beats guessing on the forget data by far
    is refused. Choose `epochs`, `lr` and `optimizer` as for training; the default length suits small data only.

    Source: exact unlearning, the reference of the whole literature.

    Args:
        reinitialise: draw every moving parameter anew before the first step, by the `reset_parameters` of its module,
            with the run's seed; buffers of those modules are reset as well. Weights that do not move stay.

    Raises:
        ArgumentError: reinitialise is no bool, or comes with a trim or a mask, whose weights it would draw anew.
    """

    reinitialise: bool = False

    name: ClassVar[str] = "retrain"
    caveat: ClassVar[str] = (
        "Exact only as far as nothing else comes from the forget data: the weights it began with, those that did not "
        "move, the normalisation statistics and every setting chosen with their help. This is not checked."
    )
    own_objective: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    uses_forget: ClassVar[bool] = False
    steps: ClassVar[int] = 600

    def __post_init__(self) -> None:
        check_flags(reinitialise=self.reinitialise)
        for part in ("trim", "mask"):
            if self.reinitialise and getattr(self, part) is not None:
                raise ArgumentError(
                    f"{part}={getattr(self, part)!r}: reinitialise=True draws every moving weight anew, whatever it "
                    "says; leave it None"
                )

    @property
    def cost(self) -> Cost:
        """One pass and its gradient."""
        return Cost(passes=1, buffers=1, note="as many steps as training takes")

    def prepare(self, passes: Passes) -> Gradient:
        """New weights where they are asked for, or else a look at whether the model is evidently trained.

        Raises:
            ModelError: the model knows the forget data, or has a parameter that cannot be drawn anew.
        """
        if self.reinitialise:
            reinitialise(passes, passes.space.theta, shuffle=False)
        elif _knows(passes):
            raise ModelError(
                "model: knows the forget data already, so that training it on would be fine-tuning; pass a freshly "
                "made model, or method=fastlur.methods.Retrain(reinitialise=True)"
            )
        return Gradient(passes)

    def direction(self, passes: Passes, state: Gradient) -> Direction:
        """∇L_r."""
        passes.gradient("retain", state.gradient)
        return Direction(state.gradient)


def _knows(passes: Passes) -> bool:
    """Whether the model beats guessing by far on a forget batch; False where it cannot take one as a classifier."""
    guessing = 0.0

    def loss(model: object, batch: object) -> Tensor:
        nonlocal guessing
        logits, targets = logits_and_targets(model, batch)
        guessing = math.log(logits.shape[-1])
        return functional.cross_entropy(logits.float(), targets)

    batch = next(passes.feed.batches("forget", limit=1))
    try:
        with passes.aside({"forget": batch}):
            return float(passes.value("forget", loss=loss)) < KNOWN * guessing
    except Exception as error:  # data of any kind may be forgotten, and those that do not fit were not learned
        if lacks_memory(error):
            raise
        return False
