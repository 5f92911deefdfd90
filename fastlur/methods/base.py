"""The protocol of a method: three small functions. Whoever adds a method adds one file and touches nothing else.

A method of one's own is a subclass of `Recipe`, passed as an instance: `unlearn(…, method=Mine())`. Those that ship
with the package are the modules beside this one; each is found by its presence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fastlur import ops
from fastlur.errors import ArgumentError, NonFiniteError, finite, unknown
from fastlur.identity import fingerprint
from fastlur.losses import BoundedForgetting
from fastlur.passes import Loss, NormalizeBy, Passes, Which
from fastlur.space import Vector
from fastlur.task import CAUSAL, CLASSIFICATION

BYTE = 0.25  # a byte a weight, in parameter-sized vectors of float32


class Direction(NamedTuple):
    """The vector to descend along, as a sum of two, and what the update adds to it in the same walk.

    Attributes:
        retain: what retaining contributes, or the whole sum where a method only knows that.
        forget: what forgetting contributes.
        mask: bool; where it is False nothing moves, weight decay included. It is changed: a mask that the user
            asked for is taken into it.
        l1: factor of an L1 penalty on the weights.
        prox: factor of the proximal term ½·prox·Σ F (θ − θ₀)².
        theta0: its centre.
        fisher: its weights F; None: 1.
    """

    retain: Vector
    forget: Vector | None = None
    mask: Vector | None = None
    l1: float = 0.0
    prox: float = 0.0
    theta0: Vector | None = None
    fisher: Vector | None = None


class State:
    """What a method carries from step to step. This one carries nothing; subclass it to add something."""

    def vectors(self) -> dict[str, Vector]:
        """The vectors that the next step depends on, by name: what a checkpoint must hold."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Other tensors that the next step depends on, by name; they are written to in place on resuming."""
        return {}

    def resume(self, names: Sequence[str]) -> dict[str, Vector]:
        """The vectors to read back, given the names that `vectors` had; the caller fills them."""
        return self.vectors()


class Gradient(State):
    """Room for the gradient of one side. Every step overwrites it, so that nothing is carried."""

    def __init__(self, passes: Passes) -> None:
        self.gradient = passes.space.vector()


class Gradients(State):
    """Room for the gradients of both sides. Every step overwrites them, so that nothing is carried."""

    def __init__(self, passes: Passes) -> None:
        self.retain = passes.space.vector()
        self.forget = passes.space.vector()


@dataclass(frozen=True)
class Cost:
    """What a step of a method costs, in units that hold for any model.

    Attributes:
        passes: forwards with a backward, each over one batch.
        forwards: forwards alone.
        products: Hessian-vector products.
        buffers: parameter-sized vectors beyond the parameters and the optimizer's, gradients included.
        temporaries: parameter-sized vectors beyond those, at most, while no pass is going on.
        joint: the activations of both batches are alive at once.
        adds: gradients are added up or laid out flat as they come, so that each tensor's is there twice for a moment;
            False: they may stay where autograd makes them.
        note: what else there is to pay, such as a search before the first step.
        masks: how many of the buffers are masks: a byte a weight whatever its type, counted as the quarter of a vector
            that it is of float32.
    """

    passes: float
    forwards: float = 0
    products: float = 0
    buffers: float = 2
    note: str = ""
    temporaries: float = 0
    joint: bool = False
    adds: bool = False
    masks: int = 0

    def __str__(self) -> str:
        parts = [f"{self.passes:g} passes" if self.passes != 1 else "1 pass"]
        parts += [f"{self.forwards:g} forwards" if self.forwards != 1 else "1 forward"] if self.forwards else []
        parts += ["a Hessian-vector product"] if self.products else []
        parts += [f"{self.buffers:g} buffers" if self.buffers != 1 else "1 buffer"]
        return ", ".join(parts) + (f"; {self.note}" if self.note else "")


class Method(Protocol):
    """A way to forget, as what runs it sees it: an instance of a subclass of `Recipe`, which has all but `direction`.

    Attributes:
        name: as `unlearn(method=…)` takes it.
        forget_weight: the factor λ ≥ 0 on the forget loss.
    """

    name: ClassVar[str]

    @property
    def forget_weight(self) -> float:
        """λ ≥ 0."""
        ...

    def default_forget_loss(self, task: str) -> Loss:
        """The forget loss where the user gives none."""
        ...

    def prepare(self, passes: Passes) -> Any:
        """Once, before the first step; returns a `State`, or an instance of a subclass of it."""
        ...

    def direction(self, passes: Passes, state: Any) -> Direction:
        """Per step: two vectors whose sum is the direction to descend along (the second may be absent)."""
        ...

    def finish(self, passes: Passes, state: Any) -> None:
        """Once, after the last step."""
        ...

    def settings(self) -> dict[str, Any]:
        """What distinguishes this instance, as plain JSON values."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What methods have in common: subclass it as a frozen dataclass, name it, and write `direction`.

    Class attributes:
        name: as `unlearn(method=…)` takes it.
        training: passes run in train mode (normalisation by the batch); False: in eval mode, statistics as given.
        own_objective: the method defines what it minimises on the forget data; a `forget_loss` is refused.
        uses_forget: False: no step passes a forget batch through the model, so the data need not fit a loss, unless a
            trim or a mask looks at them.
        measures_forget: `prepare` takes the retain loss of the forget data, as a trim and a mask do; it is then tried
            on a forget batch before anything changes.
        tasks: what it can be used for: "classification", "causal_lm" or both.
        steps: how many steps where the user says nothing; None: as many as `unlearn` takes; 0: it works without.
        rewrites: `prepare` writes to the weights themselves; they are then put back where something fails before the
            first step.
        rates: learning rates by optimizer where the user says nothing and `unlearn`'s do not fit.
        max_grad_norm: what the direction is clipped to where the user says nothing; None: nothing.
        caveat: what the method does not guarantee, a sentence or two for the record of a run.
        presets: published settings by name: arguments of `unlearn`, those of the method itself under "method".

    Args:
        trim: what is done to the weights before anything else, such as `fastlur.methods.Trim()`; None: nothing.
        mask: says once which weights may move at all, such as `fastlur.methods.SaliencyMask()`; None: all.
        normalize_by: whose statistics batch norm takes in forget passes in train mode: their "own", as published runs
            have it, or those of a quarter of the step's "retain" items (`fastlur.virtual_norm`). In models without
            batch norm there is no difference, and it costs nothing.
    """

    trim: Callable[[Passes], None] | None = field(default=None, kw_only=True)
    mask: Callable[[Passes], Vector] | None = field(default=None, kw_only=True)
    normalize_by: NormalizeBy = field(default="own", kw_only=True)

    name: ClassVar[str] = "unnamed"
    training: ClassVar[bool] = True
    own_objective: ClassVar[bool] = False
    uses_forget: ClassVar[bool] = True
    measures_forget: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = (CLASSIFICATION, CAUSAL)
    steps: ClassVar[int | None] = None
    rewrites: ClassVar[bool] = False
    rates: ClassVar[dict[str, float]] = {}
    max_grad_norm: ClassVar[float | None] = None
    caveat: ClassVar[str] = (
        "Approximate unlearning by optimisation, not certified deletion: nothing proves that the forget items have no "
        "influence left on the weights."
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @property
    def forget_weight(self) -> float:
        """λ; 1 unless the method has an argument of that name."""
        return 1.0

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let `cost` hold that of the parts that are switched on: a method says what it costs without them."""
        super().__init_subclass__(**keywords)
        own = vars(cls).get("cost")
        if own is not None:
            cls.cost = property(lambda self: _with_parts(_own(own, self), self), doc=own.__doc__)  # type: ignore[assignment, method-assign]

    @property
    def cost(self) -> Cost:
        """Of a step, with that of `trim` and `mask`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a step costs")

    def default_forget_loss(self, task: str) -> Loss:
        """Bounded gradient ascent; of text every token by itself."""
        return BoundedForgetting(per_target=True if task == CAUSAL else None)

    def prepare(self, passes: Passes) -> Any:
        """Nothing to do."""
        return State()

    def direction(self, passes: Passes, state: Any) -> Direction:
        """The one function that every method has to write."""
        raise NotImplementedError(f"{type(self).__name__} has no direction")

    def finish(self, passes: Passes, state: Any) -> None:
        """Nothing to do."""

    def settings(self) -> dict[str, Any]:
        """The arguments, as plain JSON values."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


def checked_mask(mask: object) -> Vector:
    """What a mask component returned.

    Raises:
        ArgumentError: it is no vector of bool.
    """
    if not isinstance(mask, Vector) or any(flat.dtype != torch.bool for flat in mask.flats):
        raise ArgumentError(f"mask: returned a {type(mask).__name__}; it must fill passes.space.vector(torch.bool)")
    return mask


def checked_direction(direction: object, method: object) -> Direction:
    """What a method's `direction` returned.

    Raises:
        ArgumentError: it is no `Direction`.
    """
    if not isinstance(direction, Direction):
        kind, name = type(direction).__name__, type(method).__name__
        raise ArgumentError(f"method: direction of {name} must return a Direction, not a {kind}")
    return direction


def alike(vector: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Flat buffers in the types of others, which they are already but for parameters of few bits."""
    return [mine.to(its.dtype) for mine, its in zip(vector, other, strict=True)]


def check_finite(total: Vector, which: Which) -> None:
    """Refuse gradients summed up before the steps that are not finite; waits for the device.

    Raises:
        NonFiniteError: they are not.
    """
    if not bool(torch.isfinite(ops.grad_dot(total.flats, total.flats)[0]).all()):
        raise NonFiniteError(f"{which}: a gradient of these data is not finite; the model is as it came")


def _own(cost: Any, method: Recipe) -> Cost:
    found: Cost = cost.__get__(method) if isinstance(cost, property) else cost
    return found


def _with_parts(cost: Any, method: Recipe) -> Any:
    """The cost with what the parts add: a mask is held as long as the run, a byte a weight; a trim leaves nothing."""
    if not isinstance(cost, Cost):
        return cost
    notes = [cost.note]
    if method.trim is not None:
        notes.append(getattr(method.trim, "note", "before the first step: the trim"))
    if method.mask is not None:
        notes.append(getattr(method.mask, "note", "once: the mask"))
    if not unknown(method.normalize_by, ("retain",)) and method.training and method.uses_forget:
        notes.append("with batch norm a quarter of the retain batch is run again in every forget pass")
    note = "; ".join(filter(None, notes))
    masks = int(method.mask is not None)
    return replace(cost, buffers=cost.buffers + masks * BYTE, masks=cost.masks + masks, note=note)


def check_range(name: str, value: object, low: float = 0.0, high: float | None = None, example: object = None) -> None:
    """Refuse what is not a finite number in [low, high].

    Raises:
        ArgumentError: with the range and an example.
    """
    if not finite(value) or value < low or (high is not None and value > high):
        span = f"≥ {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        such = "" if example is None else f", such as {example}"
        raise ArgumentError(f"{name}={value!r} must be a finite number {span}{such}")


def _plain(value: Any) -> Any:
    """A value of a dataclass field as JSON knows it, the same in another process: no addresses."""
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else fingerprint(value)
