"""Which parameters of a module move, and where in flat storage each of them lives."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastlur.errors import ModelError, told
from fastlur.leaves import remedy_for_frozen

Selection = None | str | Sequence[str] | Callable[[str, nn.Parameter], bool]

ALIGN = 64  # bytes; what torch's own CPU allocations have, and a multiple of the 16 that GPU kernels want


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives. Tied parameters share a slot."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    group: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    original_stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


def select(model: nn.Module, parameters: Selection) -> list[tuple[str, nn.Parameter]]:
    """The (name, parameter) pairs that may move; a tied parameter appears once for each of its names.

    Raises:
        ModelError: there are none, or a pattern matches no parameter at all.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("model: is TorchScript; pass the module that it was made from")
    named = list(model.named_parameters(remove_duplicate=False))
    if not (parameters is None or callable(parameters) or _patterns(parameters)):
        raise ModelError(f"parameters={parameters!r} must be None, a glob, several, or a predicate (name, parameter)")
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if patterns is None:
        chosen = {id(p) for _, p in named}
    elif callable(patterns):
        with told(ModelError, "parameters: the predicate (name, parameter) failed"):
            chosen = {id(p) for name, p in named if patterns(name, p)}
    else:
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
                some = ", ".join(name for name, _ in named[:8])
                raise ModelError(f"parameters: {pattern!r} matches no parameter of the model; names are like {some}")
        chosen = {id(p) for name, p in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    moving = [(name, p) for name, p in named if id(p) in chosen and p.requires_grad]
    if not moving:
        if named and not any(p.is_floating_point() for _, p in named):
            dtype = named[0][1].dtype
            raise ModelError(f"model: its parameters are {dtype}, not floating point; unlearn before quantising it")
        what = "model" if parameters is None else "parameters"
        remedy = remedy_for_frozen(model) or "set requires_grad on some, or choose others"
        raise ModelError(f"{what}: no trainable parameter to move; {remedy}")
    for name, p in named:
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ModelError(f"model: parameter {name!r} has no shape yet; let the model see a batch first")
    for name, p in moving:
        if not p.is_floating_point() or p.layout != torch.strided or not _plain(p):
            kind = f"{p.dtype}, {p.layout}, {type(p.data).__name__}"
            raise ModelError(f"model: parameter {name!r} is {kind}; only dense floating-point tensors can be moved")
    devices = sorted({str(p.device) for _, p in moving})
    if len(devices) > 1 or devices == ["meta"]:
        raise ModelError(f"model: the moving parameters are on {', '.join(devices)}; put them on one real device")
    return moving


def _patterns(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and bool(value) and all(isinstance(each, str) for each in value)


def _plain(parameter: nn.Parameter) -> bool:
    return type(parameter.data) is Tensor


def tied(
    model: nn.Module, moving: list[tuple[str, nn.Parameter]]
) -> list[tuple[tuple[str, ...], tuple[nn.Parameter, ...]]]:
    """Group names and objects that are one parameter: the same object, or objects over the very same memory."""
    names: dict[object, list[str]] = {}
    objects: dict[object, list[nn.Parameter]] = {}
    for name, p in moving:
        key = _place(p)
        names.setdefault(key, []).append(name)
        held = objects.setdefault(key, [])
        if not any(p is other for other in held):
            held.append(p)
    chosen = {id(p) for _, p in moving}
    still: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if id(p) not in chosen]
    still += list(model.named_buffers())
    first: list[tuple[str, Tensor]] = [(names[key][0], objects[key][0]) for key in names]
    extents = sorted((*_extent(p), name, id(p) in chosen) for name, p in first + still if p.numel())
    for (_, end, name, moves), (begin, _, other, too) in pairwise(extents):
        if begin < end and (moves or too):
            raise ModelError(
                f"model: {name!r} and {other!r} share memory but are not one parameter that may move as a whole; "
                "clone one of them, or let both move or neither"
            )
    return [(tuple(names[key]), tuple(objects[key])) for key in names]


def _place(p: nn.Parameter) -> object:
    return (p.data_ptr(), p.shape, p.stride(), p.dtype) if p.numel() else id(p)


def _extent(p: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()


def layout(
    groups: list[tuple[tuple[str, ...], tuple[nn.Parameter, ...]]], memory_format: torch.memory_format | None
) -> tuple[list[Slot], dict[torch.dtype, int]]:
    """Lay the parameters out one after the other, one buffer a dtype, each aligned."""
    sizes: dict[torch.dtype, int] = {}
    slots = []
    for names, parameters in groups:
        p = parameters[0]
        # empty_like keeps the strides of a dense tensor (channels_last, transposed) and makes others contiguous
        original = torch.empty_like(p, device="meta")
        laid = original
        if memory_format is not None and p.dim() == 4:
            laid = torch.empty_like(p, device="meta", memory_format=memory_format)
        offset = sizes.get(p.dtype, 0)
        step = ALIGN // p.element_size()
        sizes[p.dtype] = -(-(offset + p.numel()) // step) * step
        group = list(sizes).index(p.dtype)
        slots.append(Slot(names, parameters, group, offset, p.shape, laid.stride(), original.stride()))
    return slots, sizes
