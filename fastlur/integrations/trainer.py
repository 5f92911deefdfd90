"""What the Trainer of transformers is given for LUR: renamed where its versions differ, refused where it cannot be."""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from typing import Any

from torch import nn

from fastlur.errors import ArgumentError, ModelError, nearest
from fastlur.leaves import remedy_for_frozen


def check_loss(loss: Any, known: Collection[str]) -> None:
    """Refuse a forget loss that is neither known by name nor to be called, or that lacks its reference.

    Raises:
        ArgumentError: it is.
    """
    if isinstance(loss, str) and loss not in known:
        raise ArgumentError(f"forget_loss={loss!r} is unknown; {nearest(loss, known)}")
    if not isinstance(loss, str) and not callable(loss):
        raise ArgumentError(f"forget_loss={loss!r} cannot be called; pass (model, batch) -> scalar, or a name")
    if hasattr(loss, "prepare") and getattr(loss, "reference", None) is None:
        raise ArgumentError(
            f"forget_loss={loss!r} compares with the model as given, which only a run of fastlur.unlearn makes it see; "
            "pass reference=fastlur.llm.reference_log_probs(model, forget) to it, or choose another"
        )


def moving(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that may move, by name.

    Raises:
        ModelError: there are none.
    """
    found = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    if not found:
        remedy = remedy_for_frozen(model) or "let some parameters require a gradient"
        raise ModelError(f"model: nothing may move; {remedy}")
    return found


def named_as_now(trainer: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a Trainer: open-unlearning says `tokenizer`, which newer ones know as `processing_class` alone."""
    theirs = next((each for each in trainer.__mro__ if each.__module__ == "transformers.trainer"), None)
    if "tokenizer" not in arguments or theirs is None or "tokenizer" in signature(theirs).parameters:
        return arguments
    renamed = dict(arguments)
    return {"processing_class": renamed.pop("tokenizer")} | renamed


def refuse_many(args: Any, accelerator: Any) -> None:
    """Refuse what would average, shard or scale gradients between the passes.

    Raises:
        ArgumentError: see above.
    """
    kind = str(getattr(accelerator, "distributed_type", "NO")).rsplit(".", 1)[-1]
    if kind != "NO" or args.n_gpu > 1:
        raise ArgumentError(f"args: LUR runs in one process on one device, not {kind} on {args.n_gpu} GPUs")
    if args.fp16:
        raise ArgumentError("args: fp16=True scales losses, which a displacement cannot take; use bf16=True")
