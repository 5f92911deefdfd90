"""ScissorHands: trim what the forget data lean on, then repair along a direction that does not bring them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from fastlur.errors import ArgumentError, nearest, unknown
from fastlur.losses import negative_cross_entropy
from fastlur.methods.base import Cost, Direction, Recipe, check_range
from fastlur.methods.components import Layers, Trim, check_batches, check_layers
from fastlur.methods.repair import PublishedRepair, Repair
from fastlur.passes import Passes

Form = Literal["cleaned", "as_published"]
LAYERS = ("layer3.*", "layer4.*", "fc.*")


def _published(lr: float, sparsity: float, forget_weight: float, **more: Any) -> dict[str, Any]:
    """One published run on a ResNet-18."""
    method = {"forget_weight": forget_weight, "trim": Trim(sparsity, LAYERS), "layers": LAYERS, **more}
    return {
        "method": method,
        "forget_loss": negative_cross_entropy,
        "lr": lr,
        "epochs": 10,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }


@dataclass(frozen=True)
class ScissorHands(Recipe):
    """Trim the weights the forget data lean on, then repair along gradients kept from undoing the forgetting.

    Each epoch, at a frozen copy φ of θ in eval mode: m_t = ∇L_f(φ; forget batch t), t = 1 … T, on the chosen layers.
    Each step g = ∇[L_r(retain) + λ L_f(forget)]; if any ⟨g, m_t⟩ < 0: g ← g + Mv, v = argmin_{v ≥ ½}
    ½ vᵀ(MᵀM + 10⁻³I)v + (Mᵀg)ᵀv. Once the forget data are used up within the epoch, plain retain steps follow.

    L_f is −cross-entropy; the presets have it plain, as published. Since v ≥ ½ however large the memories are, and
    plain ascent has gradients that grow as it goes on, this runs away where the forget data are not random ones (it
    does on a class of digits). The default is therefore `fastlur.losses.BoundedForgetting`, the same until 10 nats
    above chance.

    An epoch is as many steps as the longer side has batches. It takes the forget data in an order of its own, so that
    each item comes in every epoch; of a loader, an epoch's forget batches are held on the host. Where the retain data
    are the shorter they come round again. In the trim, normalisation layers are left out, and so they are of the chosen
    layers here.

    Source: Wu & Harandi, "Scissorhands", arXiv 2401.06187, and the authors' code. Statistics of batch norm move in the
    retain pass only, as everywhere in this package; there, a joint forward over both batches moves them.

    Args:
        forget_weight: λ ≥ 0.
        memories: T ≥ 1. All published runs have 1, whose programme has a closed form and waits for nothing; more need
            a solver on the host, which waits for the device in every step that may conflict.
        layers: globs of the names of the layers in which conflicts count; None: all. The trim has its own.
        project_every: look for conflicts in every n-th step of an epoch, the first included.
        form: "cleaned", or "as_published" for the same direction at the published cost: a deep copy of the model with
            gradients of its own held all the time, one joint backward, conflicting gradients solved for in float64 on
            the host, and every step the garbage collector, the CUDA cache and both losses read.
        trim: see `fastlur.methods.Trim`; None: repair only.
        mask: see `Recipe`.

    Raises:
        ArgumentError: a value out of range. ModelError: a glob matches nothing that moves.
    """

    forget_weight: float = 0.05
    memories: int = 1
    layers: Layers = None
    project_every: int = 1
    form: Form = "cleaned"
    trim: Callable[[Passes], None] | None = field(default=Trim(), kw_only=True)

    name: ClassVar[str] = "scissorhands"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10_random10": _published(5e-3, 0.97, 0.05),
        "cifar10_random50": _published(1e-3, 0.97, 0.01, project_every=10),
        "cifar100_random10": _published(5e-3, 0.99, 1.0),
        "svhn": _published(1e-3, 0.9, 0.01),
    }

    def __post_init__(self) -> None:
        check_range("forget_weight", self.forget_weight, example=0.05)
        check_layers(self.layers)
        for name in ("memories", "project_every"):
            if getattr(self, name) is None:
                raise ArgumentError(f"{name}=None must be a positive whole number, such as 1")
            check_batches(getattr(self, name), name)
        if unknown(self.form, get_args(Form)):
            raise ArgumentError(f"form={self.form!r} is no form; {nearest(self.form, get_args(Form))}")

    @property
    def cost(self) -> Cost:
        """A pass a side while forget data are left, then one; a gradient and the memories (and φ, as published)."""
        once = f"once an epoch: {self.memories} pass{'es' * (self.memories > 1)}"
        note = f"1 pass once the epoch's forget data are used up; {once}"
        if self.form == "as_published":
            host = max(6 + 2 * self.memories, 3 + 3 * self.memories)  # copies in float64, in the worst of moments
            more = f"{note}; solved on the host"
            return Cost(passes=2, buffers=3 + self.memories, note=more, temporaries=host, joint=True, adds=True)
        return Cost(passes=2, buffers=1 + self.memories, note=note, adds=True)

    def prepare(self, passes: Passes) -> Repair:
        """Allocate the gradient and the memories; the first step of an epoch fills them."""
        form = Repair if self.form == "cleaned" else PublishedRepair
        return form(passes, self.memories, self.layers)

    def direction(self, passes: Passes, state: Repair) -> Direction:
        """The repaired gradient, whole."""
        index = state.index()
        if index == 0:
            state.anchor()
        if state.forgets(index):
            state.draw(index)
            state.joint_gradient()
            if index % self.project_every == 0:
                state.project()
        else:
            state.retain_gradient()
        state.tidy()
        return Direction(state.gradient)
