"""Boundary expanding: a class of their own for the forget data, taken away at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlur.errors import ModelError, first_line
from fastlur.losses import IGNORED, cross_entropy, logits_and_targets
from fastlur.methods.base import Cost, Direction, Gradients, Recipe, check_range
from fastlur.passes import Passes
from fastlur.task import CLASSIFICATION
from fastlur.world import borrowed_random

REMEDY = "use method='boundary_shrink', which needs no such layer"


@dataclass(frozen=True)
class BoundaryExpand(Recipe):
    """Teach the forget data a class of their own, and take that class away in the end.

    Rule: descend along w ∇L_r + λ ∇CE(θ, u; x, shadow), where the forget pass sees one more logit, ⟨u, h⟩ + b of the
    features h that enter the last `nn.Linear` registered, and "shadow" is the class of that logit. u and b follow their
    own plain gradient descent. Without them, a forget item falls to whichever class comes next.

    The row u is a tensor of the method, held beside the model and seen by forget passes alone: the model has its own
    shape and the same keys in `state_dict` at every moment, and there is nothing left to cut off at the end. Forget
    passes run the plain module, compiled or not.

    Source: Chen et al., "Boundary Unlearning", arXiv 2303.11570, where only the forget data are trained on (w = 0), for
    a few small steps. How few and how small is ours, in the preset too: on digits its 40 steps took 1 % of the rest for
    half of the mislabelled images, and left a class as it was; without the retain term nothing was found that takes a
    class and leaves the others, and the steps of `unlearn` ruin the model. The retain term is ours.

    Args:
        forget_weight: λ ≥ 0.
        retain_weight: w ≥ 0; 0 leaves the pass over the retain batch out.
        row_lr: learning rate ≥ 0 of u and b. A small one: the model has to come to the row. Where the row comes to the
            model (0.1 on digits) the true class stays the likeliest of those that remain.

    Raises:
        ArgumentError: a value out of range.
    """

    forget_weight: float = 2.0
    retain_weight: float = 1.0
    row_lr: float = 0.01

    name: ClassVar[str] = "boundary_expand"
    caveat: ClassVar[str] = (
        "The answers were moved elsewhere; features from which the forget items can be told apart may stay below the "
        "last layer. Approximate, without a certificate of deletion."
    )
    own_objective: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION,)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"method": {"retain_weight": 0.0}, "lr": 3e-3, "steps": 40}
    }

    def __post_init__(self) -> None:
        check_range("forget_weight", self.forget_weight, example=1.0)
        check_range("retain_weight", self.retain_weight, example=1.0)
        check_range("row_lr", self.row_lr, example=0.01)

    @property
    def cost(self) -> Cost:
        """The passes and their gradients; the row is small."""
        return Cost(passes=2 if self.retain_weight > 0 else 1)

    def prepare(self, passes: Passes) -> Shadow:
        """Find the last layer and draw the shadow's row.

        Raises:
            ModelError: what the model returns does not come from the `nn.Linear` that was registered last.
        """
        with borrowed_random(passes.space.device):
            batch = next(passes.feed.batches("forget", limit=1))
        shadow = Shadow(passes)
        with passes.aside({"forget": batch}), shadow.widened():
            try:
                passes.value("forget", loss=shadow.loss)
            except RuntimeError as error:  # something behind the layer does not take one more
                raise ModelError(
                    f"model: goes on after its last registered nn.Linear ({first_line(error)}); {REMEDY}"
                ) from error
        return shadow

    def direction(self, passes: Passes, state: Shadow) -> Direction:
        """Retaining, and the shadow class on the forget batch."""
        if self.retain_weight:
            passes.gradient("retain", state.retain, weight=self.retain_weight)
        change = state.gradient(passes)
        state.row.sub_(change, alpha=self.row_lr)
        return Direction(state.retain, state.forget) if self.retain_weight else Direction(state.forget)


class Shadow(Gradients):
    """The gradients of a step, and the row of weights behind the extra logit."""

    def __init__(self, passes: Passes) -> None:
        super().__init__(passes)
        layers = [module for module in passes.space.model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ModelError(f"model: has no nn.Linear to add a class to; {REMEDY}")
        self.spare, self.layer, self.ran = passes.spare, layers[-1], False
        size, like = self.layer.in_features, self.layer.weight
        drawn = torch.rand(size + 1, dtype=torch.float64) * 2 - 1  # as nn.Linear draws: weights, and the bias last
        self.row = (drawn / math.sqrt(size)).to(like.device, torch.promote_types(like.dtype, torch.float32))

    def gradient(self, passes: Passes) -> Tensor:
        """The forget gradient into its place; returns that of the row."""
        self.row.requires_grad_()
        try:
            with self.widened():
                passes.gradient("forget", self.forget, loss=self.loss, also=[self.row])
            assert self.row.grad is not None
            return self.row.grad
        finally:
            self.row.grad = None
            self.row.requires_grad_(False)

    def loss(self, model: object, batch: Any) -> Tensor:
        """Cross-entropy towards the shadow inside `widened`, by the plain module: a compiled one may not look at hooks.

        Raises:
            ModelError: the extra logit does not arrive among the model's.
        """
        logits, targets = logits_and_targets(self.spare.plain, batch)
        shadow = self.layer.out_features
        if not self.ran or logits.shape[-1] != shadow + 1:
            raise ModelError(f"model: does not return what its last registered nn.Linear does; {REMEDY}")
        return cross_entropy(lambda _: logits, (None, torch.where(targets == IGNORED, targets, shadow)))

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Inside, the last layer returns one more logit."""

        def widen(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.ran = True
            row = self.row.to(inputs[0].dtype)
            return torch.cat([output, functional.linear(inputs[0], row[None, :-1], row[-1:]).to(output.dtype)], -1)

        self.ran = False
        handle = self.layer.register_forward_hook(widen)
        try:
            yield
        finally:
            handle.remove()

    def tensors(self) -> dict[str, Tensor]:
        """The row."""
        return {"row": self.row}
