"""What a run will take, before it is made: peak memory, part by part, and seconds per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from fastlur import checks, footprint, ops
from fastlur.data import to_device
from fastlur.errors import ArgumentError, DataError, told
from fastlur.footprint import Memory
from fastlur.losses import cross_entropy
from fastlur.methods import resolve
from fastlur.methods.base import BYTE, Cost, Method
from fastlur.passes import Loss, Passes, Which
from fastlur.placement import tensors
from fastlur.reach import SPARE, most
from fastlur.slots import Selection
from fastlur.space import ParameterSpace, Vector
from fastlur.task import CLASSIFICATION, of_model
from fastlur.update import check_optimizer
from fastlur.world import borrowed_random

MEBI = 1 << 20
DISPLACED = 3  # vectors that `displace` reads and writes: the unit in which vector work is timed
TAUGHT = 3  # vectors beside its weights that a target has while it is trained: a gradient and two moments
DECIDED = 2  # by the dots of a step
UPDATED = {"sgd": 6, "adamw": 8}  # by its update


@dataclass(frozen=True)
class Estimate:
    """What a run is predicted to take at most, in bytes on the model's device, and seconds per step.

    Attributes:
        parameters: the model: weights, moving or not, and buffers.
        vectors: the method's parameter-sized vectors, gradients included, and a mask.
        optimizer: the optimizer's.
        activations: what a pass takes beyond all these: activations (the gradient that it makes has its place among
            the vectors already), temporaries of its operations, and, where it is copied or added, the gradient of a
            tensor until it is in its place. For "exact" also the graph that the Hessian-vector product needs.
        batch: a batch of each side.
        other: copies of the model's buffers, by which a bad step is undone, the model that is a target, and what a
            trim, a mask or a target in the making or work between the passes takes beyond a pass.
        seconds: of a step.
    """

    parameters: int
    vectors: int
    optimizer: int
    activations: int
    batch: int
    other: int
    seconds: float

    @property
    def peak(self) -> int:
        """The sum of the parts, in bytes."""
        return self.parameters + self.vectors + self.optimizer + self.activations + self.batch + self.other

    def __str__(self) -> str:
        parts = [f"{each.name} {getattr(self, each.name) / MEBI:.1f}" for each in fields(self) if each.type == "int"]
        return f"{self.peak / MEBI:.1f} MiB ({', '.join(parts)}), {self.seconds:.3g} s a step"


@torch.inference_mode(False)
def estimate(
    model: nn.Module,
    batch: Any,
    method: str | Method = "lur",
    *,
    forget: Any = None,
    loss: Loss | None = None,
    forget_loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer = "sgd",
    parameters: Selection = None,
    precision: str = "fp32",
    memory_format: torch.memory_format | None = None,
) -> Estimate:
    """Predict peak memory and seconds per step of a run, from a pass or two over one batch.

    Example:
        >>> print(fastlur.estimate(model, (inputs, targets), method=fastlur.LUR(gradient="exact")))  # doctest: +SKIP

    A forward and backward is traced for its memory and made again for its time; the method's `cost` says how many
    vectors there are beside it and how many passes a step takes. For "exact" the graph of the inner gradient and the
    Hessian-vector product are measured as well. That takes less memory than the run will, and the model is afterwards
    as it was: weights, their storage, buffers, gradients, modes and random state. (On CUDA torch's record of the peak
    starts again.)

    Peak memory is that of the steps and of a trim, a mask or a target (`fastlur.targets`) in the making before them.
    What is counted stands in docs/memory.md. Not in it: the interpreter and its libraries, what an allocator keeps for
    itself, the data, checkpoints, a retain budget, and what a method does before its first step by itself, such as the
    Fisher information of SSD. Steps that run a compiled forward take less. Seconds are of a step, without a target's
    training.

    Args:
        model: on the CPU or on a CUDA device.
        batch: a retain batch of the size to be used, as losses take it.
        method: a name or an instance.
        forget: a forget batch, if it is of another size or kind; None: like `batch`.
        loss: retain loss; None: cross-entropy.
        forget_loss: None: the method's own.
        optimizer: "sgd", "adamw", or a `torch.optim.Optimizer`; of one that has taken no step yet, the state is
            guessed: two vectors where it has betas, one where it has momentum, otherwise none.
        parameters: which may move, as for `unlearn`.
        precision: "fp32" or "bf16".
        memory_format: as for `unlearn`.

    Returns:
        The `Estimate`; its `peak` is the sum of the parts.

    Raises:
        ArgumentError: an argument of an unknown name, a method that does not tell its cost, a device that cannot be
            asked, or a profiler that is running.
        ModelError: nothing to move, or a kind of parameter that cannot be moved.
        DataError: the model or a loss cannot take a batch, or the loss is no scalar that depends on a moving parameter.
    """
    checks.module(model)
    checks.memory_format(memory_format)
    checks.losses(loss=loss, forget_loss=forget_loss)
    method = resolve(method)
    cost = _cost(method)
    check_optimizer(optimizer)
    checks.one_of("precision", precision, checks.PRECISIONS)
    with _opened(model, parameters, memory_format) as space, borrowed_random(space.device):
        batches: dict[Which, Any] = {"retain": batch, "forget": batch if forget is None else forget}
        batches = {side: to_device(each, space.device, memory_format) for side, each in batches.items()}
        losses: dict[Which, Loss] = {
            "retain": loss or cross_entropy,
            "forget": forget_loss or method.default_forget_loss(of_model(model) or CLASSIFICATION),
        }
        passes = Passes(
            space,
            losses,
            {"retain": 1.0, "forget": method.forget_weight},
            precision=precision,
            training=getattr(method, "training", True),
            normalize_by=getattr(method, "normalize_by", "own"),
        )
        same = forget is None and forget_loss is None and not passes.borrows
        alike = same or not getattr(method, "uses_forget", True)
        sides: list[Which] = ["retain"] if alike else ["retain", "forget"]
        aside = passes.aside(batches, training=passes.training)
        with aside, told(DataError, "batch: the model or a loss cannot take it"):
            activations, seconds = _passes(passes, sides, method, cost)
        moving = sum(flat.nbytes for flat in space.theta.flats)
        weights = sum(flat.numel() for flat in space.theta.flats)
        copied = not isinstance(optimizer, str) or most(space.theta.flats) < SPARE  # for the time of an update
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        still = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values()) - sum(
            leaf.nbytes for leaf in space.leaves()
        )
        walks = DECIDED + UPDATED.get(str(optimizer), max(UPDATED.values())) + DISPLACED * max(0, cost.buffers - 1)
        seconds += _walk(space) * walks
    masks = cost.masks * weights
    vectors = round((cost.buffers - BYTE * cost.masks) * moving) + masks
    target = (moving + still + buffers) * sum(getattr(loss, "models", 0) for loss in losses.values())
    step = vectors + buffers + target + max(activations, round((cost.temporaries + copied) * moving))
    making = target + TAUGHT * moving + activations if target else 0
    before = max(_before(method, moving, weights, activations) + target, making)
    return Estimate(
        parameters=moving + still + buffers,
        vectors=vectors,
        optimizer=_state(optimizer, moving),
        activations=activations,
        batch=sum(tensor.nbytes for tensor in tensors(batches)),
        other=max(step, before) - vectors - activations,
        seconds=seconds,
    )


def _cost(method: Method) -> Cost:
    try:
        cost = getattr(method, "cost", None)
    except NotImplementedError:
        cost = None
    if not isinstance(cost, Cost):
        raise ArgumentError(f"method: {type(method).__name__} does not tell its cost; give it a property `cost`")
    return cost


@contextmanager
def _opened(
    model: nn.Module, parameters: Selection, memory_format: torch.memory_format | None
) -> Iterator[ParameterSpace]:
    """The parameters in flat storage; afterwards in the very storage they had, with the gradients they had."""
    before = [(parameter, parameter.data, parameter.grad) for parameter in model.parameters()]
    space = ParameterSpace(model, parameters, memory_format)
    try:
        yield space
    finally:
        space.close()
        for parameter, data, gradient in before:
            parameter.data = data
            parameter.grad = gradient


def _passes(passes: Passes, sides: list[Which], method: Method, cost: Cost) -> tuple[int, float]:
    """Bytes that the passes of a step take beyond the vectors at most, and the seconds that they take together."""
    space = passes.space
    moving = sum(flat.nbytes for flat in space.theta.flats)

    def measured(*parts: footprint.Work) -> tuple[list[Memory], float]:
        found = footprint.memory(parts, space.device)
        return found, sum(footprint.seconds(part, space.device) for part in parts)

    def room() -> Vector:  # made within what is traced, since a pass may leave tensors in it as autograd made them
        vector = space.vector()
        if cost.adds:
            vector.zero_()
        return vector

    found = [measured(lambda side=side: passes.gradient(side, room())) for side in sides]  # type: ignore[misc]
    peak = max(memory[0].peak for memory, _ in found) - moving
    once = sum(spent for _, spent in found) / len(found)
    spent = once * cost.passes
    if cost.joint:
        peak = max(peak, measured(lambda: passes.joint(room()))[0][0].peak - moving)
    if cost.products:
        curved, curving = measured(*_curved(passes, method))
        # the outer gradient is taken while the graph of the inner one is held
        peak = max(curved[0].left + peak, *(part.peak for part in curved))
        spent = once + curving * cost.products
    forwards = cost.forwards + sum(getattr(loss, "models", 0) for loss in passes.losses.values())  # a target is asked
    if forwards:
        spent += forwards * footprint.seconds(lambda: passes.value(sides[0]), space.device)
    return peak, spent


def _curved(passes: Passes, method: Method) -> list[footprint.Work]:
    """The inner gradient, and its Hessian-vector product."""
    side: Which = "forget" if getattr(method, "order", "") == "forget_first" else "retain"
    by: Any = getattr(method, "hessian", "autograd")
    keep = getattr(method, "keep_graph", True)
    inner, product = passes.space.vector(), passes.space.vector()
    for vector in (inner, product):
        vector.zero_()
    pulls: list[Any] = []
    return [
        lambda: pulls.append(passes.linearize(side, inner, keep_graph=keep, by=by)),
        lambda: pulls.pop()(inner, product),
    ]


def _walk(space: ParameterSpace) -> float:
    """Seconds to read or write one parameter-sized vector."""
    out, theta = space.vector().flats, space.theta.flats
    ops.displace(out, theta, theta, 0.0)
    return footprint.seconds(lambda: ops.displace(out, theta, theta, 0.0), space.device) / DISPLACED


def _before(method: Method, moving: int, weights: int, activations: int) -> int:
    """Bytes that a trim or a mask, itself a byte a weight, takes beyond parameters and optimizer."""
    found = 0
    for name, itself in (("trim", 0), ("mask", weights)):
        passing, after = getattr(getattr(method, name, None), "buffers", (0, 0))
        if passing:
            found = max(found, round(passing * moving) + activations + itself, round(after * moving) + itself)
    return found


def _state(optimizer: str | torch.optim.Optimizer, moving: int) -> int:
    """Bytes of the optimizer's vectors; a torch optimizer gets its gradient in one more."""
    if isinstance(optimizer, str):
        return moving * (2 if optimizer == "adamw" else 1)
    held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in tensors(state))
    first = optimizer.param_groups[0]
    guessed = moving * (2 if "betas" in first else 1 if first.get("momentum") else 0)
    return moving + (held or guessed)
