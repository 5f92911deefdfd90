"""ParameterSpace: the parameters that may move, in flat storage, and the model seen at another point.

The moving parameters of each dtype live in one flat buffer; the module's own `Parameter` objects become views of it.
Vectors of the same layout hold gradients, moments and displaced points, so that every operation of a step is one walk
over one buffer, however many tensors the model has.

The model is evaluated elsewhere (at θ − αd) by pointing the parameters at another vector's views: no copy of the
module, and θ itself is never written, so nothing has to be undone by arithmetic. Autograd does not notice such a swap.
That is why it must never happen while a graph that will still be differentiated is alive; the passes of this package
build and free their graph inside one swap.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastlur.errors import ModelError

Selection = None | str | Sequence[str] | Callable[[str, nn.Parameter], bool]

_open: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose parameters are in flat storage now

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


class Vector:
    """A vector with the layout of a space: `flats`, one buffer a dtype; `views`, shaped; `spans`, flat, one a slot."""

    def __init__(self, slots: Sequence[Slot], flats: list[Tensor]) -> None:
        self.flats = flats
        self.views = [flats[s.group].as_strided(s.shape, s.stride, s.offset) for s in slots]
        self.spans = [flats[s.group][s.offset : s.offset + s.numel] for s in slots]

    def zero_(self) -> None:
        """Set every element to 0."""
        torch._foreach_zero_(self.flats)

    def part(self, slots: Sequence[int] | None) -> list[Tensor]:
        """The whole vector, or only some slots of it, as operations take it."""
        return self.flats if slots is None else [self.spans[index] for index in slots]


class ParameterSpace:
    """The moving parameters of a module, in flat storage from construction until `close`.

    Args:
        model: the module; its moving parameters must be floating point and on one device.
        parameters: which parameters may move: None for all that require a gradient, a glob or several
            ("layer4.*", "*.bias"), or a predicate `(name, parameter) -> bool`. Parameters that do not require a
            gradient never move. A tied parameter is chosen when any of its names is.
        memory_format: `torch.channels_last` lays four-dimensional weights out that way while the space is open.

    Raises:
        ModelError: nothing is left to move, a pattern matches nothing, or a parameter is of a kind that cannot be held
            in flat storage (complex, sparse, partly overlapping storage, several devices).
    """

    def __init__(
        self, model: nn.Module, parameters: Selection = None, memory_format: torch.memory_format | None = None
    ) -> None:
        if model in _open:
            raise ModelError("model: is open in another step, whose close() would undo this one; close that first")
        groups = _tied(model, select(model, parameters))
        self.model = model
        self.slots, sizes = _layout(groups, memory_format)
        self.device = self.slots[0].parameters[0].device
        self._frozen = [
            p for p in model.parameters() if p.requires_grad and id(p) not in {id(q) for _, g in groups for q in g}
        ]
        self.reached: set[int] = set()
        self.collecting = False  # a pass is going on: its graph may be alive
        with torch.no_grad():
            self.theta = Vector(self.slots, [torch.zeros(n, dtype=d, device=self.device) for d, n in sizes.items()])
            for slot, view in zip(self.slots, self.theta.views, strict=True):
                view.copy_(slot.parameters[0])
        self._point_at(self.theta)
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._hooks = []
        for index, slot in enumerate(self.slots):
            for parameter in slot.parameters:
                parameter.grad = None
                hook = parameter.register_post_accumulate_grad_hook(self._note(index))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)
        self.closed = False
        _open.add(model)

    @property
    def names(self) -> list[str]:
        """The first name of every slot, in order."""
        return [slot.names[0] for slot in self.slots]

    def vector(self, dtype: torch.dtype | None = None) -> Vector:
        """A new vector of zeros (also in the gaps between slots, which every operation then leaves at zero)."""
        return Vector(self.slots, [torch.zeros_like(flat, dtype=dtype) for flat in self.theta.flats])

    def copy(self) -> Vector:
        """A new vector that holds θ as it is now."""
        made = self.vector()
        with torch.no_grad():
            torch._foreach_copy_(made.flats, self.theta.flats)
        return made

    @contextmanager
    def at(self, point: Vector | None) -> Iterator[None]:
        """Inside, the module's parameters are those of `point` (None: as they are, no swap); such blocks may nest."""
        if point is None:
            yield
            return
        before = self._here
        try:
            self._point_at(point)
            yield
        finally:
            self._point_at(before)

    @contextmanager
    def collect(self, out: Vector, add: bool = False) -> Iterator[None]:
        """Inside, a backward pass adds the gradient into `out`, cleared first; slots it reaches join `reached`.

        With `add` nothing is cleared.
        """
        if not add:
            out.zero_()
        try:
            self.collecting = True
            for slot, view in zip(self.slots, out.views, strict=True):
                for parameter in slot.parameters:
                    parameter.grad = view
            yield
        finally:
            self.collecting = False
            self.drop_gradients()

    def leaves(self) -> list[nn.Parameter]:
        """The moving parameters themselves; tied ones once an object."""
        return [parameter for slot in self.slots for parameter in slot.parameters]

    def missed(self) -> list[int] | None:
        """The reached slots, in order, where some slot was not reached; None where all were."""
        return None if len(self.reached) == len(self.slots) else sorted(self.reached)

    def drop_gradients(self) -> None:
        """Leave no gradient on the moving parameters."""
        for parameter in self.leaves():
            parameter.grad = None

    def check(self) -> None:
        """Raise if the space is closed or somebody replaced the storage of a parameter while it was open.

        Raises:
            ModelError: it is.
        """
        if self.closed:
            raise ModelError("the step is closed: make a new one to go on")
        for slot, view in zip(self.slots, self.theta.views, strict=True):
            if slot.parameters[0].data_ptr() != view.data_ptr():
                raise ModelError(
                    f"model: the storage of {slot.names[0]!r} was replaced while the step was open "
                    "(model.to(), half() or the like); call close() first, then change the model"
                )

    def close(self) -> None:
        """Give the model back: parameters with storage, strides and requires_grad of their own, no gradients."""
        if self.closed:
            return
        for hook in self._hooks:
            hook.remove()
        self.drop_gradients()
        with torch.no_grad():
            for slot, view in zip(self.slots, self.theta.views, strict=True):
                own = torch.empty_strided(slot.shape, slot.original_stride, dtype=view.dtype, device=view.device)
                own.copy_(view)
                for parameter in slot.parameters:
                    parameter.data = own
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.closed = True
        _open.discard(self.model)

    def _point_at(self, point: Vector) -> None:
        self._here = point
        for slot, view in zip(self.slots, point.views, strict=True):
            for parameter in slot.parameters:
                parameter.data = view

    def _note(self, index: int) -> Callable[[Tensor], None]:
        return lambda _: self.reached.add(index)


def select(model: nn.Module, parameters: Selection) -> list[tuple[str, nn.Parameter]]:
    """The (name, parameter) pairs that may move; a tied parameter appears once for each of its names.

    Raises:
        ModelError: there are none, or a pattern matches no parameter at all.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    if not (parameters is None or callable(parameters) or _patterns(parameters)):
        raise ModelError(f"parameters={parameters!r} must be None, a glob, several, or a predicate (name, parameter)")
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if patterns is None:
        chosen = {id(p) for _, p in named}
    elif callable(patterns):
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
        raise ModelError(f"{what}: no trainable parameter to move; set requires_grad on some, or choose others")
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


def _tied(
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


def _layout(
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
