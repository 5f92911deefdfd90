"""What the vector operations take: vectors that fit each other, and hyper-parameters as device scalars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlur.errors import ArgumentError
from fastlur.reference import BETA2, CLIP, CONTROL, EPS, HYPER, L1, LR, MOMENTUM, OK, PROX, SCALE, WEIGHT_DECAY

Vector = Tensor | Sequence[Tensor]
Number = float | Tensor
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
LENGTHS: dict[str, int | None] = {"control": CONTROL, "dots": 3, "hyper": HYPER, "losses": None}  # None: any
NAMES = {LR: "lr", MOMENTUM: "momentum", BETA2: "beta2", EPS: "eps", WEIGHT_DECAY: "weight_decay"}
NAMES |= {L1: "l1", PROX: "prox", CLIP: "clip"}


class Operand(NamedTuple):
    """A list of tensors as a schema names it."""

    name: str
    optional: bool = False
    written: bool = False


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

    Raises:
        ArgumentError: one is no number.
    """
    named = {LR: lr, MOMENTUM: momentum, BETA2: beta2, EPS: eps, WEIGHT_DECAY: weight_decay}
    named |= {L1: l1, PROX: prox, CLIP: clip}
    ordered = [named[place] for place in range(HYPER)]
    where = torch.device(device)
    if where.type == "cpu" and all(isinstance(value, float | int) for value in ordered):
        with suppress(OverflowError, RuntimeError):  # an integer too large for torch, or for a float64 too
            return torch.tensor(ordered, dtype=torch.float64, device=where)
    # filled on the device, number by number: a copy from the host would wait for it
    return torch.stack([scalar(value, where, NAMES[place]) for place, value in enumerate(ordered)])


def scalar(value: Number, device: torch.device, name: str = "value") -> Tensor:
    """A number as a 0-d float64 tensor on the device, without waiting for it (unless given a tensor from elsewhere).

    Raises:
        ArgumentError: a tensor with more than one element, or no number.
    """
    if isinstance(value, Tensor):
        if forward_ad._current_level >= 0:
            refuse_tangents([name], [value])
        if value.is_nested or value.numel() != 1 or value.is_complex():
            what = "a nested tensor" if value.is_nested else f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            raise ArgumentError(f"{name}: {what} is no hyper-parameter; pass a number")
        if value.dtype == torch.float64 and value.dim() == 0 and value.device == device and not value.requires_grad:
            return value  # as it is wanted: four calls into torch saved
        if value.is_meta and device.type != "meta":
            raise ArgumentError(f"{name}: is on meta, where it has no value; pass a number")
        return value.detach().reshape(()).to(device, torch.float64)
    try:
        # an integer of torch's is short: those of Python are turned into a float first
        number = float(value) if isinstance(value, int) else value
        return torch.full((), number, dtype=torch.float64, device=device)
    except OverflowError as error:
        raise ArgumentError(f"{name}: is too large for a float64; pass a smaller number") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name}={value!r} is no hyper-parameter; pass a number") from error


def share_of(sparsity: Number) -> float:
    """The float that prints as the number does: 0.29 in float32 is a little less, and would be 28 of 100 scores."""
    number: Any = sparsity
    try:
        if isinstance(sparsity, Tensor):
            if sparsity.is_complex():
                raise TypeError("complex")
            value = sparsity.detach().reshape(()).cpu()
            # the fewest digits that name this number in its own dtype
            exact = float(value.double())
            digits = (float(f"{exact:.{count}g}") for count in range(1, 18))
            return next((each for each in digits if torch.tensor(each).to(value.dtype) == value), exact)
        return float(str(number) if hasattr(number, "dtype") else number)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"sparsity={sparsity!r} must be a number in [0, 1]") from error


def fit_scalars(beside: Any, names: Sequence[str], scalars: Sequence[Any]) -> None:
    """Refuse vectors of scalars that an operation would read past, in the wrong dtype or on another device.

    Args:
        beside: the tensors that they go with.
        names: of the scalars; one that is not in LENGTHS is passed over.
        scalars: themselves.

    Raises:
        ArgumentError: one is not float64, not of its length, or not on the device of the others.
    """
    place = beside[0] if isinstance(beside, list | tuple) and beside else None
    where = "the data"
    for name, tensor in zip(names, scalars, strict=True):
        if name not in LENGTHS:
            continue
        length = LENGTHS[name]
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: is a {type(tensor).__name__}; it must be a tensor")
        if tensor.is_nested or tensor.layout != torch.strided:
            what = "a nested tensor" if tensor.is_nested else tensor.layout
            raise ArgumentError(f"{name}: is {what}; pass an ordinary tensor, such as its to_dense()")
        if length is not None and (tensor.dtype != torch.float64 or tensor.shape != (length,)):
            what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ArgumentError(f"{name}: is {what}; it must be float64 of shape ({length},)")
        if place is None:
            place, where = tensor, name
        if tensor.device != place.device:
            there = f"{where} on {place.device}"
            raise ArgumentError(f"{name}: is on {tensor.device}, {there}; move it with .to({str(place.device)!r})")


def listed(vector: Vector | None) -> Any:
    """A vector as a list of tensors; what is none stays as it is, for `fit` to name."""
    if isinstance(vector, Tensor):
        return [vector]
    if isinstance(vector, list | tuple | str | Mapping) or not isinstance(vector, Iterable):
        return vector
    return list(vector)


def device_of(vector: Any) -> torch.device:
    """Where a list of tensors is; the CPU where there is nothing in it, or it is none."""
    first = vector[0] if isinstance(vector, list | tuple) and vector else None
    return first.device if isinstance(first, Tensor) else CPU


def refuse_tangents(names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Refuse dual tensors of forward-mode differentiation, whose tangents would silently be lost.

    Args:
        names: of the arguments.
        arguments: tensors, lists of tensors, or anything else, which is passed over.

    Raises:
        ArgumentError: one has a tangent at the level that is open now.
    """
    if torch._C._are_functorch_transforms_active():
        return  # `fit` refuses all that belongs to one, and names the remedy for that
    for name, argument in zip(names, arguments, strict=True):
        for tensor in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
                raise ArgumentError(
                    f"{name}: has a tangent of torch.autograd.forward_ad, which these operations do not carry on; pass "
                    "unpack_dual(it).primal"
                )


def fit(operands: Sequence[Operand], vectors: Sequence[Any]) -> None:
    """Refuse what is no vector, and vectors that do not fit each other: a look at lengths, shapes, dtypes and devices.

    Moments may be float32 beside half weights.

    Raises:
        ArgumentError: naming the argument, what is wrong with it and what to do.
    """
    # a custom operation has no rule there, and a gradient or tangent through one would silently be zero
    if torch._C._are_functorch_transforms_active():
        raise ArgumentError(
            "vectors: belong to a torch.func transform, which cannot look into these operations; call them outside of "
            "it, on the gradients that it returns"
        )
    # whole lists are compared first: this runs at every call, and names are looked for only where it fails
    if not _fitting(operands, vectors):
        _explain(operands, vectors)


def _fitting(operands: Sequence[Operand], vectors: Sequence[Any]) -> bool:
    first: list[Any] = []
    moments: list[Any] = []
    for operand, vector in zip(operands, vectors, strict=True):
        if vector is None and operand.optional:
            continue
        if not isinstance(vector, list | tuple):
            return False
        try:
            found = [(x.dtype, x.shape, x.device, x.layout) for x in vector]
        except (AttributeError, RuntimeError):  # no tensor, or a nested one, which has no shape
            return False
        if operand is operands[0]:
            first = found
            device = found[0][2] if found else CPU
            if not all(x[0] in FLOATS and x[2] == device and x[3] == torch.strided for x in found):
                return False
            continue
        if len(found) != len(first):
            return False
        wanted = first
        if operand.name == "mask":
            wanted = [(torch.bool, *x[1:]) for x in first]
        elif operand.name == "moment1":
            wanted = moments = [_moment(x, y) for x, y in zip(first, found, strict=True)]
        elif operand.name == "moment2":
            wanted = moments
        if found != wanted:
            return False
    return True


def _moment(weight: tuple[Any, ...], moment: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a moment must look like that looks like this, beside such a weight."""
    wide = moment[0] == torch.float32 and weight[0] in HALVES
    return (torch.float32 if wide else weight[0], *weight[1:])


def _explain(operands: Sequence[Operand], vectors: Sequence[Any]) -> None:
    """Raise for the first thing that is wrong, in words."""
    pairs: list[tuple[Operand, Any]] = list(zip(operands, vectors, strict=True))
    given = [(operand, each) for operand, each in pairs if _is_vector(operand, each)]
    (lead, first), *others = given
    for index, tensor in enumerate(first):
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
            raise ArgumentError(f"{lead.name}[{index}] is {tensor.dtype}; vectors are of one of {kinds}")
        if tensor.device != first[0].device:
            raise ArgumentError(f"{lead.name}[{index}] is on {tensor.device}, {lead.name}[0] on {first[0].device}")
    moments = first
    for operand, each in others:
        name = operand.name
        if len(each) != len(first):
            raise ArgumentError(f"{name} has {len(each)} tensors, {lead.name} has {len(first)}")
        for index, (tensor, like, moment) in enumerate(zip(each, first, moments, strict=True)):
            dtype = torch.bool if name == "mask" else moment.dtype if name == "moment2" else like.dtype
            if tensor.shape != like.shape:
                there = f"{lead.name}[{index}] {tuple(like.shape)}"
                raise ArgumentError(f"{name}[{index}] has shape {tuple(tensor.shape)}, {there}")
            wide = name == "moment1" and tensor.dtype == torch.float32 and dtype in HALVES
            if tensor.dtype != dtype and not wide:
                raise ArgumentError(f"{name}[{index}] is {tensor.dtype}; it must be {dtype}")
            if tensor.device != like.device:
                raise ArgumentError(f"{name}[{index}] is on {tensor.device}, {lead.name}[{index}] on {like.device}")
        moments = each if name == "moment1" else moments
    raise ArgumentError(f"{', '.join(operand.name for operand, _ in given)}: do not fit each other")


def _is_vector(operand: Operand, vector: Any) -> bool:
    """Whether there is one; raises where there is something else, or nothing where something must be."""
    if vector is None and operand.optional:
        return False
    if not isinstance(vector, list | tuple):
        remedy = ", such as list(it.values())" if isinstance(vector, Mapping) else ""
        what = "None" if vector is None else f"a {type(vector).__name__}"
        raise ArgumentError(f"{operand.name}: is {what}; pass a tensor or a list of tensors{remedy}")
    for index, tensor in enumerate(vector):
        if not isinstance(tensor, Tensor):
            what = "None" if tensor is None else f"a {type(tensor).__name__}"
            raise ArgumentError(f"{operand.name}[{index}] is {what}; leave it out, or pass a tensor")
        if tensor.is_nested:
            raise ArgumentError(f"{operand.name}[{index}] is a nested tensor; pass its unbind(), a list of tensors")
        if tensor.layout != torch.strided:
            raise ArgumentError(f"{operand.name}[{index}] is {tensor.layout}; call to_dense() on it first")
    return True
