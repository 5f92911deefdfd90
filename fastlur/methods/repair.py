"""The repair of ScissorHands, part by part, so that each can be run and timed alone: anchors, gradients, projection."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastlur import ops
from fastlur.fresh import copied
from fastlur.methods.base import State
from fastlur.methods.components import Layers, chosen_slots
from fastlur.passes import Passes
from fastlur.space import Vector

RIDGE = 1e-3
LEAST = 0.5
Numbers = NDArray[np.float64]


class Repair(State):
    """The gradient of a step and the memories of an epoch, and what is done with them, without waiting for the device.

    A memory is zero outside the chosen layers, so that products and sums over the whole vector are those over the
    chosen layers. φ is θ itself at the start of the epoch: its gradients are all taken there, before θ moves.

    Args:
        passes: the passes of the run.
        count: T, how many memories.
        layers: globs of the chosen layers, or None.
    """

    def __init__(self, passes: Passes, count: int, layers: Layers) -> None:
        self.passes = passes
        self.chosen = chosen_slots(passes.space, layers)
        self.gradient = passes.space.vector()
        self.memories = [passes.space.vector() for _ in range(count)]
        self._outside = sorted(set(range(len(passes.space.slots))) - set(self.chosen))
        self._gram: Numbers | None = None
        self._drawn: tuple[int, Callable[[int], Any]] | None = None
        self._forget_batches = passes.feed.per_epoch("forget")
        lengths = [passes.feed.per_epoch("retain"), self._forget_batches]
        known = [length for length in lengths if length is not None]
        self._length = max(known) if len(known) == len(lengths) else None  # unknown: one epoch that does not end

    def index(self) -> int:
        """The place of the present step in its epoch, from 0."""
        step = self.passes.step - 1
        return step if self._length is None else step % self._length

    def epoch(self) -> int:
        """The number of the present epoch, from 0."""
        return 0 if self._length is None else (self.passes.step - 1) // self._length

    def draw(self, index: int) -> None:
        """Take the step's forget batch from this epoch's own pass over the forget data.

        The run's stream goes on while retain steps are made, so that a later epoch would begin anywhere in it and miss
        items; in the first epoch the stream itself begins with a whole pass.
        """
        epoch = self.epoch()
        if epoch == 0:
            return
        draw = "repair", epoch
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self.passes.feed.epoch("forget", draw)
        self.passes.replace("forget", self._drawn[1](index), draw, index)

    def forgets(self, index: int) -> bool:
        """Whether forget data are left at this place of the epoch."""
        return self._forget_batches is None or index < self._forget_batches

    def anchor(self) -> None:
        """Set the memories from the model as it is now: once an epoch, T passes in eval mode."""
        batches = self.passes.feed.batches("forget", len(self.memories), draw=("memory", self.epoch()))
        for memory, batch in zip(self.memories, batches, strict=False):  # fewer batches: zeros, never in conflict
            self._remember(memory, batch)
        self._gram = None

    def joint_gradient(self) -> None:
        """g ← ∇[L_r + λL_f]: two passes into one buffer, so that only one batch's activations are alive at once."""
        self.passes.gradient("retain", self.gradient)
        self.passes.gradient("forget", self.gradient, add=True)

    def retain_gradient(self) -> None:
        """g ← ∇L_r, when the epoch's forget data are used up."""
        self.passes.gradient("retain", self.gradient)

    def project(self) -> None:
        """g ← g + Mv where g and a memory are in conflict; with one memory decided on the device, else on the host."""
        g = self.gradient.flats
        if len(self.memories) == 1:
            m = self.memories[0].flats
            ops.project(m, g, ops.grad_dot(m, g)[0], "scissorhands")
            return
        with_gradient = torch.stack([ops.grad_dot(memory.flats, g)[0][0] for memory in self.memories])
        dots = with_gradient.cpu().numpy()  # waits: the solver is on the host
        if not np.isfinite(dots).all() or (dots >= 0).all():
            return
        if self._gram is None:
            rows = [[ops.grad_dot(x.flats, y.flats)[0][0] for y in self.memories] for x in self.memories]
            self._gram = torch.stack([torch.stack(row) for row in rows]).cpu().numpy()
        for memory, v in zip(self.memories, solve(self._gram, dots), strict=True):
            ops.displace(g, g, memory.flats, -float(v))

    def tidy(self) -> None:
        """Nothing to do after a step."""

    def vectors(self) -> dict[str, Vector]:
        """The memories: an epoch may be interrupted in the middle."""
        return {f"memory{t}": memory for t, memory in enumerate(self.memories)}

    def resume(self, names: Sequence[str]) -> dict[str, Vector]:
        """The same; what was derived from them is derived anew."""
        self._gram = None
        return self.vectors()

    def _remember(self, memory: Vector, batch: object) -> None:
        with self.passes.aside({"forget": batch}):
            self.passes.gradient("forget", memory, weight=1.0)
        with torch.no_grad():
            for index in self._outside:
                memory.spans[index].zero_()


class PublishedRepair(Repair):
    """The same direction at the cost of the authors' code, which waits for the device several times a step."""

    def __init__(self, passes: Passes, count: int, layers: Layers) -> None:
        super().__init__(passes, count, layers)
        self.twin: nn.Module | None = None

    def anchor(self) -> None:
        """As above, at a deep copy of the model, which stays with its gradients until the next epoch."""
        self.twin = copied(self.passes.space.model).eval()
        super().anchor()

    def joint_gradient(self) -> None:
        """As above, by one backward of the joint loss."""
        self.passes.joint(self.gradient)

    def project(self) -> None:
        """As above; gradient and memories in conflict go to the host in float64, and the result comes back."""
        with torch.no_grad():
            g, memories = self._joined(self.gradient), torch.stack([self._joined(m) for m in self.memories])
            dots = memories @ g
            if not bool((dots < 0).any()) or not bool(torch.isfinite(dots).all()):
                return
            g, memories = g.cpu().double(), memories.cpu().double()
            v = solve((memories @ memories.T).numpy(), (memories @ g).numpy())
            g = (g + memories.T @ torch.from_numpy(v)).to(self.passes.space.device)
            parts = [self.gradient.spans[index] for index in self.chosen]
            ends = torch.tensor([part.numel() for part in parts]).cumsum(0)[:-1]
            torch._foreach_copy_(parts, g.tensor_split(ends))

    def tidy(self) -> None:
        """Collect garbage, empty the CUDA cache, read the losses."""
        gc.collect()
        if self.passes.space.device.type == "cuda":
            torch.cuda.empty_cache()
        for loss in self.passes.values.values():
            loss.item()

    def _remember(self, memory: Vector, batch: object) -> None:
        assert self.twin is not None
        self.twin.zero_grad(set_to_none=True)
        with self.passes.aside({"forget": batch}):
            self.twin.eval()
            torch.autograd.backward(self.passes.losses["forget"](self.twin, batch))
        named = dict(self.twin.named_parameters(remove_duplicate=False))
        memory.zero_()
        with torch.no_grad():
            for index in self.chosen:
                slot = self.passes.space.slots[index]
                for parameter in {id(named[name]): named[name] for name in slot.names}.values():
                    if parameter.grad is not None:
                        memory.views[index].add_(parameter.grad)

    def _joined(self, vector: Vector) -> Tensor:
        return torch.cat([vector.spans[index] for index in self.chosen])


def solve(gram: Numbers, dots: Numbers) -> Numbers:
    """argmin_{v ≥ ½} ½ vᵀ(G + 10⁻³I)v + dᵀv, as a bounded least-squares problem: ½‖Av + A⁻ᵀd‖², AᵀA = G + 10⁻³I.

    A comes from the eigenvalues, those lost in rounding (of large memories that are nearly the same one) raised to what
    rounding leaves of them: a Cholesky factor need not exist there. The active-set solver gives the exact answer; where
    it finds no end, an interior one comes close to it.

    Args:
        gram: G = MᵀM, shape (T, T), float64.
        dots: d = Mᵀg, shape (T,), float64.

    Returns:
        v, shape (T,), float64.
    """
    from scipy.optimize import lsq_linear

    values, vectors = np.linalg.eigh(gram + RIDGE * np.eye(len(gram)))
    roots = np.sqrt(np.maximum(values, max(RIDGE, len(gram) * np.finfo(float).eps * values[-1])))
    factor, target = roots[:, None] * vectors.T, -(vectors.T @ dots) / roots
    for solver in ("bvls", "trf"):
        found = lsq_linear(factor, target, bounds=(LEAST, np.inf), method=solver, max_iter=100 * len(gram))
        if found.success:
            break
    v: Numbers = np.maximum(found.x, LEAST)
    return v
