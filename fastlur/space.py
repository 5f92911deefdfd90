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

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlur.errors import ModelError
from fastlur.slots import Selection, Slot, layout, select, tied

_open: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose parameters are in flat storage now


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
        groups = tied(model, select(model, parameters))
        self.model = model
        self.slots, sizes = layout(groups, memory_format)
        self.device = self.slots[0].parameters[0].device
        self._frozen = [
            p for p in model.parameters() if p.requires_grad and id(p) not in {id(q) for _, g in groups for q in g}
        ]
        self.reached: set[int] = set()
        self._out: Vector | None = None  # where the pass that is going on collects
        self._written: set[int] = set()  # slots of it that hold something to be added to
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
                hook = parameter.register_post_accumulate_grad_hook(self._take(index))  # type: ignore[no-untyped-call]
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

    @property
    def collecting(self) -> bool:
        """A pass is going on: its graph may be alive."""
        return self._out is not None

    @contextmanager
    def collect(self, out: Vector, add: bool = False) -> Iterator[None]:
        """Inside, a backward pass puts the gradient into `out`; slots it reaches join `reached`, others are 0 there.

        With `add` it is added to what `out` holds. Each gradient is taken as soon as autograd has made it, while it is
        in the cache, and freed: adding up in `out` itself would cost clearing it and reading it once more.
        """
        self._out, self._written = out, set(range(len(self.slots))) if add else set()
        self.drop_gradients()  # what the caller left there is not ours to add up
        try:
            yield
            for index in set(range(len(self.slots))) - self._written:
                out.spans[index].zero_()
        finally:
            self._out = None
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

    def _take(self, index: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            self.reached.add(index)
            out, gradient = self._out, parameter.grad
            if out is None or gradient is None:
                return
            parameter.grad = None
            view = out.views[index]
            if index in self._written:  # tied objects, or checkpointing that runs a backward within the backward
                view.add_(gradient)
            elif gradient.layout is torch.strided:
                view.copy_(gradient)
            else:
                view.zero_().add_(gradient)
            self._written.add(index)

        return take
