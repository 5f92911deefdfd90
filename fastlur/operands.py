"""What the vector operations take: vectors that fit each other, and hyper-parameters as device scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlur.errors import ArgumentError
from fastlur.reference import BETA2, CLIP, CONTROL, EPS, HYPER, L1, LR, MOMENTUM, OK, PROX, SCALE, WEIGHT_DECAY

Vector = Tensor | Sequence[Tensor]
Number = float | Tensor


def control_scalars(device: torch.device | str) -> Tensor:
    """The control scalars before the first step: the flag up, no step taken."""
    values = [0.0] * CONTROL
    values[OK] = values[SCALE] = 1.0
    return torch.tensor(values, dtype=torch.float64, device=device)


def hyper_parameters(
    device: torch.device | str,
    *,
    lr: Number = 0.0,
    momentum: Number = 0.0,
    beta2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    l1: Number = 0.0,
    prox: Number = 0.0,
    clip: Number = 0.0,
) -> Tensor:
    """The hyper-parameters of `meta_update` as one device vector, float64; keep it and change entries in place.

    Args:
        device: of the data.
        lr: learning rate.
        momentum: of SGD; β₁ of AdamW.
        beta2: of AdamW.
        eps: of AdamW.
        weight_decay: L2 for SGD and `regularize`, decoupled for AdamW.
        l1: factor of ‖θ‖₁.
        prox: factor of the proximal term.
        clip: largest norm of a + u; 0 for no clipping.
    """
    named = {LR: lr, MOMENTUM: momentum, BETA2: beta2, EPS: eps, WEIGHT_DECAY: weight_decay}
    named |= {L1: l1, PROX: prox, CLIP: clip}
    ordered = [named[place] for place in range(HYPER)]
    where = torch.device(device)
    if where.type == "cpu" and not any(isinstance(value, Tensor) for value in ordered):
        return torch.tensor(ordered, dtype=torch.float64)
    # filled on the device, number by number: a copy from the host would wait for it
    return torch.stack([scalar(value, where) for value in ordered])


def scalar(value: Number, device: torch.device) -> Tensor:
    """A number as a 0-d float64 tensor on the device, without waiting for it (unless given a tensor from elsewhere).

    Raises:
        ArgumentError: a tensor with more than one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ArgumentError(f"a tensor of shape {tuple(value.shape)} is no hyper-parameter; pass a number")
        if value.dtype == torch.float64 and value.dim() == 0 and value.device == device and not value.requires_grad:
            return value  # as it is wanted: four calls into torch saved
        return value.detach().reshape(()).to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def fit_scalars(**scalars: tuple[Tensor, int]) -> None:
    """Refuse vectors of scalars that an operation would read past, or in the wrong dtype.

    Raises:
        ArgumentError: one is not float64 or not of the length asked for.
    """
    for name, (tensor, length) in scalars.items():
        if tensor.dtype != torch.float64 or tensor.shape != (length,):
            what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ArgumentError(f"{name}: is {what}; it must be float64 of shape ({length},)")


HALVES = (torch.bfloat16, torch.float16)
MOMENTS = ("moment1", "moment2")


def fit(**vectors: Vector | None) -> Any:
    """The vectors as lists, after a look at lengths, shapes, dtypes and devices.

    Moments may be float32 beside half weights, both of them alike.
    """
    lists = {n: None if v is None else [v] if isinstance(v, Tensor) else list(v) for n, v in vectors.items()}
    (first_name, first), *others = [(name, each) for name, each in lists.items() if each is not None]
    shapes, dtypes = [x.shape for x in first], [x.dtype for x in first]
    device = first[0].device if first else None
    moments = dtypes
    for index, tensor in enumerate(first):
        if not tensor.is_floating_point():
            raise ArgumentError(f"{first_name}[{index}] is {tensor.dtype}; vectors are of a floating-point dtype")
        if tensor.device != device:
            raise ArgumentError(f"{first_name}[{index}] is on {tensor.device}, {first_name}[0] on {device}")
    for name, each in others:
        wanted = [torch.bool] * len(first) if name == "mask" else moments if name in MOMENTS else dtypes
        found = [x.dtype for x in each]
        if name == "moment1" and found != wanted:
            float32 = [torch.float32 if x in HALVES else x for x in dtypes]
            if found == float32:
                moments = wanted = float32
        # whole lists are compared first: this runs at every call, and names are looked for only where it fails
        if found != wanted or [x.shape for x in each] != shapes or any(x.device != device for x in each):
            raise ArgumentError(_misfit(name, each, first_name, first, wanted))
    # operations work on finished gradients and on weights as values: nothing of this is differentiated
    return [None if each is None else [x.detach() if x.requires_grad else x for x in each] for each in lists.values()]


def _misfit(name: str, each: list[Tensor], first_name: str, first: list[Tensor], wanted: list[torch.dtype]) -> str:
    """What does not go together, in words."""
    if len(each) != len(first):
        return f"{name} has {len(each)} tensors, {first_name} has {len(first)}"
    for index, (tensor, like, dtype) in enumerate(zip(each, first, wanted, strict=True)):
        if tensor.shape != like.shape:
            return f"{name}[{index}] has shape {tuple(tensor.shape)}, {first_name}[{index}] {tuple(like.shape)}"
        if tensor.dtype != dtype:
            return f"{name}[{index}] is {tensor.dtype}; it must be {dtype}"
        if tensor.device != like.device:
            return f"{name}[{index}] is on {tensor.device}, {first_name}[{index}] on {like.device}"
    return f"{name} does not fit {first_name}"
