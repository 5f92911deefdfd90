"""`MetaStep`: LUR's whole step for a training loop of one's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlur import checks, meta
from fastlur.curvature import By
from fastlur.errors import ArgumentError
from fastlur.losses import BoundedForgetting, cross_entropy, is_text
from fastlur.methods.lur import LUR, Order
from fastlur.passes import Loss, NormalizeBy
from fastlur.slots import Selection
from fastlur.stats import StepStats
from fastlur.step import Step
from fastlur.task import CAUSAL, CLASSIFICATION, known, viewed_as


class MetaStep(Step):
    """LUR's step for a training loop of one's own: both passes, the meta-gradient and the update in one call.

    While it is open the model works as usual (evaluation, `state_dict`), but its parameters share storage; `close()`
    (or leaving a `with` block) gives ordinary parameters back.

    Args:
        model: in place; passes run in train mode, which each step restores.
        loss: retain loss `(model, batch) -> scalar`; None: cross-entropy.
        forget_loss: loss that forgets when minimised; None: bounded ascent (`fastlur.losses.BoundedForgetting`).
        optimizer: "sgd", "adamw" or a `torch.optim.Optimizer`.
        lr: learning rate, ≥ 0; constant (`set_lr` changes it).
        momentum: of SGD.
        weight_decay: L2 for SGD, decoupled for AdamW.
        max_grad_norm: clip the direction; None: do not.
        gradient: as in `fastlur.LUR`.
        order: likewise.
        inner_lr: likewise.
        relative_inner_lr: likewise.
        forget_weight: λ ≥ 0. 1 here, where the losses are usually your own; `fastlur.LUR` has 0.3 for its own loss.
        parameters: None, globs or a predicate (see `fastlur.space.ParameterSpace`).
        precision: "fp32", or "bf16" for autocast with parameters kept as they are.
        memory_format: `torch.channels_last` for convolutional models.
        compile: run the forward through `torch.compile` (not in "exact", which transforms the plain module).
        seed: of dropout and other draws inside the passes.
        keep_graph: False: "exact" builds the inner gradient's graph anew for the Hessian-vector product.
        hessian: likewise for "exact", "autograd" or "func"; see `fastlur.LUR`.
        normalize_by: likewise; whose statistics batch norm takes in forget passes.
        capture: on a CUDA device: record the fourth step as a CUDA graph and replay it from then on, wherever batches
            have its shapes and the same plain values beside their tensors; not for losses or models that wait for the
            device or draw random numbers. After `load_state_dict` it is recorded anew, three steps later.
            Written and tested without a GPU, not yet run on one.

    Raises:
        ArgumentError, ModelError: see there; nothing was changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        forget_loss: Loss | None = None,
        *,
        optimizer: str | torch.optim.Optimizer = "sgd",
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        gradient: meta.Gradient = "optimistic",
        order: Order = "retain_first",
        inner_lr: float | None = None,
        relative_inner_lr: bool = False,
        forget_weight: float = 1.0,
        parameters: Selection = None,
        precision: str = "fp32",
        memory_format: torch.memory_format | None = None,
        compile: bool = False,
        seed: int = 0,
        keep_graph: bool = True,
        hessian: By = "autograd",
        normalize_by: NormalizeBy = "retain",
        capture: bool = False,
    ) -> None:
        checks.losses(loss=loss, forget_loss=forget_loss)
        self._task: str | None = None
        super().__init__(
            model,
            LUR(
                inner_lr,
                forget_weight,
                gradient,
                order,
                relative_inner_lr,
                keep_graph,
                hessian=hessian,
                normalize_by=normalize_by,
            ),
            {
                "retain": loss or cross_entropy,
                "forget": forget_loss or BoundedForgetting(),
            },
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            parameters=parameters,
            precision=precision,
            memory_format=memory_format,
            compile=compile,
            seed=seed,
            capture=capture,
        )

    def __call__(self, forget: Any, retain: Any) -> StepStats:
        """One step, update included; see `Step`. The first batches decide whether these are texts, if nobody says."""
        if self._task is None:
            self._task = known(self.space.model) or (CAUSAL if is_text(forget) or is_text(retain) else CLASSIFICATION)
        with viewed_as(self._task):
            return super().__call__(forget, retain)

    def set_lr(self, lr: float) -> None:
        """Change the learning rate from the next step on.

        Raises:
            ArgumentError: it is no finite number ≥ 0, or an optimizer of torch's keeps it. ModelError: the step is
                closed.
        """
        self.space.check()
        checks.rate(lr)
        if self.update.custom is not None:
            raise ArgumentError(f"lr={lr!r}: the optimizer that was passed keeps its own; set it in its param_groups")
        self.update.set_lr(lr)
