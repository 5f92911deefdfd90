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
from fastlur.interrupt import Whole
from fastlur.slots import Selection, Slot, layout, select, tied

LARGE = 128 << 10  # bytes a tensor, on average

_open: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose parameters are in flat storage now


class Vector:
    """A vector with the layout of a space: `flats`, one buffer a dtype; `views`, shaped; `spans`, flat, one a slot.

    A gradient may instead lie in `loose` tensors, one a slot, as autograd has made them, with nothing copied; `views`
    are these then. Whoever asks for `flats` or `spans` has them gathered, and from there on the vector stays flat.
    Storage is allocated when it is first needed.
    """

    def __init__(self, slots: Sequence[Slot], allocate: Callable[[], list[Tensor]]) -> None:
        self.loose: list[Tensor] | None = None
        self._slots, self._allocate = slots, allocate
        self._flats: list[Tensor] | None = None
        self._views: list[Tensor] = []
        self._spans: list[Tensor] = []

    @property
    def flats(self) -> list[Tensor]:
        """One buffer a dtype, with gaps of zeros between the slots."""
        self._gather()
        assert self._flats is not None
        return self._flats

    @property
    def spans(self) -> list[Tensor]:
        """One flat tensor a slot."""
        self._gather()
        return self._spans

    @property
    def views(self) -> list[Tensor]:
        """One shaped tensor a slot."""
        if self.loose is not None:
            return self.loose
        self._gather()
        return self._views

    @property
    def gathered(self) -> bool:
        """Whether there is flat storage."""
        return self._flats is not None

    def zero_(self) -> None:
        """Set every element to 0."""
        self.loose = None
        torch._foreach_zero_(self.flats)

    def _gather(self) -> None:
        if self._flats is None:
            self._flats = self._allocate()
            self._views = [self._flats[s.group].as_strided(s.shape, s.stride, s.offset) for s in self._slots]
            self._spans = [self._flats[s.group][s.offset : s.offset + s.numel] for s in self._slots]
        if self.loose is not None:
            loose, self.loose = self.loose, None
            with torch.no_grad():
                torch._foreach_copy_(self._views, loose)


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
        self.collecting = False  # a pass is going on: its graph may be alive
        self._taken: dict[int, Tensor] = {}  # what it has collected so far, by slot
        self._target: list[Tensor] | None = None  # where it is copied to; None: it stays where it is
        with torch.no_grad():
            device = self.device
            self.theta = Vector(self.slots, lambda: [torch.zeros(n, dtype=d, device=device) for d, n in sizes.items()])
            for slot, view in zip(self.slots, self.theta.views, strict=True):
                view.copy_(slot.parameters[0])
        self._point_at(self.theta)
        # few large tensors are best left where autograd puts them; many small ones cost more one by one than a copy
        each = sum(flat.nbytes for flat in self.theta.flats) / len(self.slots)
        self.piecewise = each >= LARGE and all(view.is_contiguous() for view in self.theta.views)
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
        theta = self.theta
        return Vector(self.slots, lambda: [torch.zeros_like(flat, dtype=dtype) for flat in theta.flats])

    def sums(self) -> Vector:
        """A new vector of zeros to add many gradients up in: float32 where the parameters have fewer bits."""
        types = [torch.promote_types(flat.dtype, torch.float32) for flat in self.theta.flats]
        if types == [flat.dtype for flat in self.theta.flats]:
            return self.vector()
        flats = self.theta.flats
        return Vector(self.slots, lambda: [torch.zeros_like(f, dtype=d) for f, d in zip(flats, types, strict=True)])

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
        """Inside, a backward pass puts the gradient into `out`; slots it reaches join `reached`, others are 0 there.

        With `add` it is added to what `out` holds. Where the space is `piecewise`, tensors stay as autograd makes them;
        elsewhere each is copied as soon as it is there, while it is in the cache, and freed.
        """
        slots = range(len(self.slots))
        self.drop_gradients()  # what the caller left there is not ours to add up
        self._taken = dict(zip(slots, out.views, strict=True)) if add else {}
        if not add:
            out.loose = None
            self._target = None if self.piecewise and not out.gathered else out.views
        self.collecting = True
        try:
            yield
            for index in [index for index in slots if index not in self._taken]:
                like = self.theta.views[index]
                self._taken[index] = torch.zeros_like(like) if self._target is None else self._target[index].zero_()
            if not out.gathered:
                out.loose = [self._taken[index] for index in slots]
        finally:
            self.collecting, self._taken, self._target = False, {}, None
            self.drop_gradients()

    def tensors(self, vector: Vector, some: list[int] | None = None) -> list[Tensor]:
        """A vector as operations take it: flat buffers, or one tensor a slot where that saves gathering gradients.

        What the vector is at the moment does not decide, or a resumed run would add up in another order than the run.

        Args:
            vector: of this space.
            some: these slots only; None: all.
        """
        if some is None:
            return vector.views if self.piecewise else vector.flats
        whole = vector.views if self.piecewise else vector.spans
        return [whole[index] for index in some]

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

    def home(self) -> None:
        """Point the module's parameters at θ: an interruption may have come while they were on their way back."""
        with Whole():
            self._point_at(self.theta)

    def _point_at(self, point: Vector) -> None:
        self._here = point
        for slot, view in zip(self.slots, point.views, strict=True):
            for parameter in slot.parameters:
                parameter.data = view

    def _take(self, index: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            self.reached.add(index)
            gradient = parameter.grad
            if not self.collecting or gradient is None:
                return
            parameter.grad = None
            held = self._taken.get(index)
            if held is not None:  # tied objects, or checkpointing that runs a backward within the backward
                held.add_(gradient)
                return
            if self._target is None and gradient.layout is torch.strided:
                self._taken[index] = gradient
                return
            own = torch.zeros_like(parameter) if self._target is None else self._target[index]
            self._taken[index] = own.copy_(gradient) if gradient.layout is torch.strided else own.zero_().add_(gradient)

        return take
