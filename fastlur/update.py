"""The update: from the two halves of a direction to moved weights, and the flag that stops a bad step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from fastlur import ops
from fastlur.errors import ArgumentError, nearest, unknown
from fastlur.methods.base import Direction
from fastlur.operands import control_scalars, hyper_parameters
from fastlur.reach import SPARE, Reach, largest, most
from fastlur.reference import L1, LR, OK, PROX, SCALE
from fastlur.space import ParameterSpace, Vector
from fastlur.statistics import put_back

DEFAULT_LR = {"sgd": 0.03, "adamw": 1e-3}
OPTIMIZERS = tuple(DEFAULT_LR)


class Update:
    """SGD with momentum, AdamW, or a torch optimizer of the caller's, over a parameter space.

    An update that would overflow is not made: `overflow` rises to 1 and the flag falls. Weights in float16, and those
    that an optimizer of the caller's moves, are copied for the time of an update and put back if it made one of them
    infinite or NaN; for others a bound decides (see `fastlur.reach`).

    Args:
        space: what moves.
        optimizer: "sgd", "adamw", or a `torch.optim.Optimizer` over (some of) the model's parameters, which then keeps
            its own learning rate; it costs one wait for the device a step, since it cannot read the flag itself.
        lr: learning rate, > 0.
        momentum: of SGD (β₁ of AdamW stays 0.9).
        weight_decay: L2 for SGD, decoupled for AdamW.
        max_grad_norm: clip the direction to this norm; None or `math.inf`: no clipping.
    """

    def __init__(
        self,
        space: ParameterSpace,
        optimizer: str | torch.optim.Optimizer,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.space = space
        self.custom = _custom(space, optimizer)
        adamw = optimizer == "adamw"
        self.first = None if self.custom else space.vector()
        self.second = space.vector() if adamw else None
        self._joint = space.vector() if self.custom else None
        self._adamw = adamw
        self._reach: Reach | None = None  # made with the first step, when there are moments
        self._dots: Tensor | None = None
        self.overflow = torch.zeros((), dtype=torch.float64, device=space.device)
        self._penalties = 0.0, 0.0
        self.control = control_scalars(space.device)
        self.hyper = hyper_parameters(
            space.device,
            lr=lr,
            momentum=0.9 if adamw else momentum,
            weight_decay=weight_decay,
            clip=0.0 if max_grad_norm in (None, math.inf) else max_grad_norm,
        )

    @property
    def lr(self) -> float | None:
        """The learning rate of a custom optimizer's first group; None for our own, whose rate is a device scalar."""
        return None if self.custom is None else float(self.custom.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """Change the learning rate; a device scalar, so nothing waits. A custom optimizer keeps its own."""
        self.hyper[LR].fill_(lr)

    def decide(self, direction: Direction, losses: list[Tensor]) -> Tensor:
        """Set the control scalars from the gradients and the losses; returns (⟨r,f⟩, ‖r‖², ‖f‖²), shape (3,)."""
        retain, forget = direction.retain, direction.forget
        dots = ops.grad_dot(self.space.tensors(retain), self.space.tensors(forget or retain))[0]
        if forget is None:
            dots[0::2] = 0.0
        ops.step_control(self.control, dots, torch.stack([loss.double() for loss in losses]), self.hyper)
        self._dots = dots
        return dots

    def look(self) -> None:
        """Between two steps: see how large the weights are, if it is time to."""
        if self._reach is not None:
            self._reach.look()

    def forget_reach(self) -> None:
        """The weights or the moments were written by somebody else."""
        if self._reach is not None:  # kept, since a graph may write to it
            self._reach.forget()

    def apply(self, direction: Direction) -> None:
        """Move the reached parameters along −direction, unless the flag is down."""
        self._penalise(direction.l1, direction.prox)
        some = self.space.missed()
        if self.custom is not None:
            self._apply_custom(self.custom, direction)
            return
        first = self.first
        assert first is not None
        before = None
        if most(self.space.theta.flats) < SPARE:
            before = self.space.copy()
        else:
            self._bound(direction, first)

        def part(vector: Vector) -> list[Tensor]:
            return self.space.tensors(vector, some)

        def maybe(vector: Vector | None) -> list[Tensor] | None:
            return None if vector is None else part(vector)

        ops.meta_update(
            part(self.space.theta),
            part(direction.retain),
            maybe(direction.forget),
            part(first),
            maybe(self.second),
            control=self.control,
            hyper=self.hyper,
            theta0=maybe(direction.theta0),
            fisher=maybe(direction.fisher),
            mask=maybe(direction.mask),
        )
        if before is not None:
            self._undo(before)

    def _bound(self, direction: Direction, first: Vector) -> None:
        """Lower the flag where the update might overflow; nothing waits for the device."""
        if self._reach is None:
            self._reach = Reach(self.space.theta.flats, first.flats, self._adamw)
            self._reach.look(now=True)
        assert self._dots is not None
        centre, weights = (None if v is None else self.space.tensors(v) for v in (direction.theta0, direction.fisher))
        self._lower(self._reach.advance(self._dots, self.control, self.hyper, centre, weights))

    def _undo(self, before: Vector) -> None:
        """Put the weights back where the update made one of them infinite or NaN."""
        fine = torch.isfinite(largest(self.space.theta.flats))
        if fine.device.type == "cpu" and bool(fine):
            return
        self._lower(fine)
        put_back(self.space.theta.flats, before.flats, fine)

    def _lower(self, fine: Tensor | bool) -> None:
        """The flag falls and `overflow` rises where it is not fine, unless the flag was down before."""
        if fine is True:
            return
        ok = self.control[OK]
        self.overflow.add_(ok)  # what the flag loses is what rises: 1, once
        ok.mul_(torch.as_tensor(fine))
        self.overflow.sub_(ok)

    def moments(self) -> dict[str, Vector]:
        """The optimizer's vectors by name."""
        named = {"first_moment": self.first, "second_moment": self.second}
        return {name: vector for name, vector in named.items() if vector is not None}

    def _penalise(self, l1: float, prox: float) -> None:
        """Set the factors of the penalties; nothing is written while they stay as they are."""
        if (l1, prox) != self._penalties:
            self.hyper[L1].fill_(l1)
            self.hyper[PROX].fill_(prox)
            self._penalties = l1, prox

    def _apply_custom(self, optimizer: torch.optim.Optimizer, direction: Direction) -> None:
        if self.control[OK].item() == 0:  # waits for the device: a foreign optimizer cannot be told otherwise
            return
        joint = self._joint
        assert joint is not None
        if direction.forget is None:
            torch._foreach_copy_(joint.flats, direction.retain.flats)
        else:
            ops.displace(joint.flats, direction.retain.flats, direction.forget.flats, -1.0)
        torch._foreach_mul_(joint.flats, self.control[SCALE])
        centre, weights = direction.theta0, direction.fisher
        ops.regularize(
            joint.flats,
            self.space.theta.flats,
            None if centre is None else centre.flats,
            None if weights is None else weights.flats,
            l1=direction.l1,
            prox=direction.prox,
        )
        still = self.space.copy()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        others = [(p, p.grad) for p in held if p.grad is not None]  # not ours to move, whatever lies there
        try:
            for parameter, _ in others:
                parameter.grad = None
            for index in self.space.reached:
                for parameter in self.space.slots[index].parameters:
                    parameter.grad = joint.views[index]
            optimizer.step()
        except BaseException:
            torch._foreach_copy_(self.space.theta.flats, still.flats)
            raise
        finally:
            self.space.drop_gradients()
            for parameter, gradient in others:
                parameter.grad = gradient
        self._undo(still)
        if direction.mask is not None:  # whatever the optimizer did to them
            for now, before, keep in zip(self.space.theta.flats, still.flats, direction.mask.flats, strict=True):
                now.copy_(torch.where(keep, now, before))


def check_optimizer(optimizer: object) -> None:
    """Refuse what is no optimizer, or one that cannot take a step from gradients alone.

    Raises:
        ArgumentError: it is.
    """
    if isinstance(optimizer, str):
        if unknown(optimizer, OPTIMIZERS):
            raise ArgumentError(f"optimizer={optimizer!r} is unknown; {nearest(optimizer, OPTIMIZERS)}")
    elif not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ArgumentError(f"optimizer: a {kind} is neither 'sgd', 'adamw' nor a torch.optim.Optimizer")
    elif isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        kind = type(optimizer).__name__
        raise ArgumentError(f"optimizer: {kind} needs a closure or sparse gradients; use another, 'sgd' or 'adamw'")


def _custom(space: ParameterSpace, optimizer: object) -> torch.optim.Optimizer | None:
    check_optimizer(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in space.leaves()):
        raise ArgumentError("optimizer: holds none of the parameters that may move; make it from model.parameters()")
    if any(len(slot.parameters) > 1 for slot in space.slots):
        raise ArgumentError(
            "optimizer: parameters tied as separate objects need 'sgd' or 'adamw'; make them one object"
        )
    return optimizer


def warn_of_rounding(dtypes: Iterable[torch.dtype]) -> None:
    """Say so where weights of these types move that have fewer bits than float32: a small step of theirs is none."""
    coarse = {dtype for dtype in dtypes if dtype.itemsize < 4}
    if coarse:
        which = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse))
        least = 25 * max(torch.finfo(dtype).eps for dtype in coarse)  # percent; half of the last bit, at its least
        warnings.warn(
            f"parameters move in {which}: what would change one by less than {least:.1g} % of it is rounded away, of "
            "the displacement that aligns gradients too; have the model in float32 under autocast (precision='bf16'), "
            "or expect small learning rates to do little",
            stacklevel=3,
        )
