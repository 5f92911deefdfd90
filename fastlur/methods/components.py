"""Parts that any method can switch on: a trim before the first step, and a mask of the weights that may move.

    fastlur.unlearn(model, forget, retain, method=fastlur.LUR(trim=Trim(), mask=SaliencyMask()))

Both measure saliency by the retain loss on the forget data (cross-entropy, for classifiers), in eval mode: a batch of
one class, normalised by its own statistics, would not be judged as the model judges it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import nn

from fastlur import ops
from fastlur.errors import ArgumentError, ModelError
from fastlur.methods.base import alike, check_finite, check_range
from fastlur.passes import Passes
from fastlur.space import ParameterSpace, Vector
from fastlur.world import derive, seed_torch

Layers = str | Sequence[str] | None


@dataclass(frozen=True)
class Trim:
    """Re-initialise the weights that matter most to the forget data, once, before the first step.

    With a = Σ_j |∇CE(θ; forget batch j)| and the saliency |a ⊙ θ| over all moving parameters: in the chosen layers,
    where it exceeds the ⌊sparsity·N⌋-th smallest, weights are drawn anew (Kaiming-uniform with a = √5, as linear and
    convolutional layers are initialised) and biases become 0. Parameters of normalisation layers stay, and so do
    those that are neither a bias nor a weight of two dimensions or more (a scale, a class token, a position embedding
    that is a bare parameter): nothing says how to draw those. A weight is what is called one, or belongs to a module
    that has `reset_parameters`.

    Source: ScissorHands, arXiv 2401.06187. Eval mode and "all batches" are reconstructed.

    Args:
        sparsity: share in [0, 1] of all moving parameters that stays; 1: nothing is trimmed.
        layers: globs of parameter names, such as ("layer4.*", "fc.*"); None: every layer.
        batches: how many forget batches, ≥ 1; None: all, each item once.

    Raises:
        ArgumentError: a value out of range. ModelError: a glob matches nothing that moves, or only normalisation.
        NonFiniteError: a gradient is not finite; no weight has changed then.
    """

    sparsity: float = 0.97
    layers: Layers = None
    batches: int | None = None

    buffers: ClassVar[tuple[float, float]] = 2, 2.25  # parameter-sized vectors during its passes, and after them
    note: ClassVar[str] = "before the first step: a pass over the forget data for the trim"

    def __post_init__(self) -> None:
        check_range("sparsity", self.sparsity, 0.0, 1.0, 0.97)
        check_layers(self.layers)
        check_batches(self.batches)

    def __call__(self, passes: Passes) -> None:
        """Trim θ; two parameter-sized vectors, given back at the end."""
        space = passes.space
        slots, weights = chosen_slots(space, self.layers), _weights(space.model)
        total, gradient = space.sums(), space.vector()
        for batch in passes.feed.batches("forget", self.batches, "trim"):
            with passes.aside({"forget": batch}):
                passes.gradient("forget", gradient, loss=passes.losses["retain"], weight=1.0)
            ops.saliency(gradient.flats, gradient.flats)
            ops.displace(total.flats, total.flats, alike(gradient.flats, total.flats), -1.0)
        del gradient
        check_finite(total, "forget")
        ops.saliency(total.flats, total.flats, alike(space.theta.flats, total.flats))
        limit = ops.threshold(total.spans, self.sparsity)  # the gaps between slots are no parameters
        seed_torch(derive(passes.seed, "trim"), space.device)
        with torch.no_grad():
            for index in slots:
                weight, slot = space.theta.views[index], space.slots[index]
                fresh = torch.zeros(slot.shape, dtype=weight.dtype, device=weight.device)
                if weight.dim() > 1 and weight.numel() and weights & set(slot.names):
                    torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5))
                elif not any(name.rpartition(".")[2].endswith("bias") for name in slot.names):
                    continue
                salient = total.views[index] > limit.to(total.views[index].dtype)
                torch.where(salient, fresh, weight, out=weight)


@dataclass(frozen=True)
class SaliencyMask:
    """Let only the weights move that matter most to the forget data; the others stay bit for bit, weight decay or not.

    The mask holds the largest `share` of |∇CE_f(θ₀)| over all moving parameters, the gradient summed over the forget
    batches. A weight on which the forget data do not depend is never in it, unless everything is (`share=1`).

    Source: SalUn, arXiv 2310.12508. Eval mode is reconstructed.

    Args:
        share: in [0, 1], of all moving parameters; 1: all move, and the forget data are not looked at.
        batches: how many forget batches, ≥ 1; None: all, each item once.

    Raises:
        ArgumentError: a value out of range. NonFiniteError: a gradient is not finite; no weight has changed then.
    """

    share: float = 0.5
    batches: int | None = None

    buffers: ClassVar[tuple[float, float]] = 1, 2  # parameter-sized vectors during its passes, and after them

    @property
    def note(self) -> str:
        """What there is to pay beside the steps."""
        return "" if self.share == 1 else "once: a pass over the forget data for the mask"

    def __post_init__(self) -> None:
        check_range("share", self.share, 0.0, 1.0, 0.5)
        check_batches(self.batches)

    def __call__(self, passes: Passes) -> Vector:
        """The mask: bool, a byte a parameter; two parameter-sized vectors while it is made."""
        space = passes.space
        mask = space.vector(torch.bool)
        if self.share == 1:
            for every in mask.flats:
                every.fill_(True)
            return mask
        total = space.sums()
        few_bits = [flat.dtype for flat in total.flats] != [flat.dtype for flat in space.theta.flats]
        gradient = space.vector() if few_bits else total
        for batch in passes.feed.batches("forget", self.batches, "mask"):
            with passes.aside({"forget": batch}):
                passes.gradient("forget", gradient, loss=passes.losses["retain"], weight=1.0, add=not few_bits)
            if few_bits:
                ops.displace(total.flats, total.flats, alike(gradient.flats, total.flats), -1.0)
        check_finite(total, "forget")
        ops.saliency(total.flats, total.flats)
        # 1 − share as people write it: 0.1 for 0.9, where floating point has a little less
        limit = ops.threshold(total.spans, float(1 - Fraction(str(self.share))))
        for keep, salient in zip(mask.flats, total.flats, strict=True):
            keep.copy_(salient > limit.to(salient.dtype))
        return mask


def _weights(model: nn.Module) -> set[str]:
    """Names of the parameters that are drawn as linear and convolutional layers draw their weights."""
    found = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        draws = any(hasattr(module, name) for name in ("reset_parameters", "_reset_parameters"))
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            if draws or "weight" in name or "parametrizations." in prefix:
                found.add(f"{prefix}.{name}" if prefix else name)
    return found


def chosen_slots(space: ParameterSpace, layers: Layers) -> list[int]:
    """The slots that globs choose (None: all), without those of normalisation layers.

    Raises:
        ModelError: a glob matches no moving parameter, or all together none outside normalisation layers.
    """
    normal = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in space.model.named_modules(remove_duplicate=False)
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    named = {index: slot.names for index, slot in enumerate(space.slots)}
    chosen: set[int] = set()
    globs = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    some = ", ".join([name for names in named.values() for name in names if name not in normal][:8])
    for glob in globs:
        matched = {i for i, names in named.items() if any(fnmatch.fnmatchcase(name, glob) for name in names)}
        if not matched:
            raise ModelError(f"layers: {glob!r} matches no parameter that moves; names are like {some}")
        chosen |= {i for i in matched if not normal & set(named[i])}
    if not chosen:
        raise ModelError(
            f"layers: {', '.join(map(repr, globs))} matches nothing that moves but normalisation layers, which always "
            f"stay out; names are like {some or '(there is no other)'}"
        )
    return sorted(chosen)


def check_layers(layers: object, name: str = "layers") -> None:
    """Refuse what are no globs.

    Raises:
        ArgumentError: with an example.
    """
    if layers is None or isinstance(layers, str):
        return
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(glob, str) for glob in layers):
        raise ArgumentError(f"{name}={layers!r} must be a glob, several, such as ('layer4.*', 'fc.*'), or None for all")


def check_batches(batches: object, name: str = "batches") -> None:
    """Refuse what is no number of batches.

    Raises:
        ArgumentError: with the remedy.
    """
    if batches is not None and (not isinstance(batches, int) or isinstance(batches, bool) or batches < 1):
        raise ArgumentError(f"{name}={batches!r} must be a positive whole number, or None for all")
