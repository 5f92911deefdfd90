"""What a model makes of a text inside: the output of one of its layers, and a forget loss that scrambles it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastlur import checks
from fastlur.errors import ArgumentError, DataError, ModelError
from fastlur.llm.likelihood import arguments
from fastlur.llm.reference import Keep, Reference, check_keep
from fastlur.losses import IGNORED, wide
from fastlur.methods.base import check_range
from fastlur.microbatch import alike
from fastlur.passes import Passes
from fastlur.rows import rows_of

Layer = int | str | Callable[[nn.Module], nn.Module]


def check_layer(layer: object) -> None:
    """Refuse what names no layer.

    Raises:
        ArgumentError: it is no whole number, text or callable.
    """
    if isinstance(layer, bool) or not (isinstance(layer, int | str) or callable(layer)):
        raise ArgumentError(f"layer={layer!r} must be a block's number, a module's name, or model -> module")


def layer_of(model: Any, layer: Layer) -> nn.Module:
    """The module meant.

    Args:
        model: the model, or what stands in for it.
        layer: a block's number in the longest `nn.ModuleList` of the model, from the end if negative; a module's name,
            or the end of one, such as "layers.7.mlp"; or a function from the model to the module.

    Raises:
        ArgumentError: there is none, or more than one of that name.
    """
    if isinstance(layer, int):
        blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
        if not -len(blocks) <= layer < len(blocks):
            raise ArgumentError(
                f"layer={layer}: the model has {len(blocks)} blocks; give a module's name, or another number"
            )
        return blocks[layer]
    if isinstance(layer, str):
        named = dict(model.named_modules())
        found = [each for each in named if each == layer] or [each for each in named if each.endswith(f".{layer}")]
        if len(found) != 1 or not layer:
            such = f"fits {', '.join(found[:4])}" if found else "fits no module; see model.named_modules()"
            raise ArgumentError(f"layer={layer!r} {such}; give one name in full")
        by_name: nn.Module = named[found[0]]
        return by_name
    module = layer(model)
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"layer: returned a {type(module).__name__} of the model, not a module")
    return module


def hidden(model: Any, batch: Any, layer: Layer) -> Tensor:
    """Run the model, and return what a layer puts out, shape (items, tokens, width).

    It is seen through a hook that is gone afterwards.

    Raises:
        ArgumentError: see `layer_of`.
        ModelError: the layer does not run once in a forward, or puts out something else; or the forward is compiled, of
            which hooks see nothing.
    """
    items, module = rows_of(batch), layer_of(model, layer)
    parts = _outputs(model, batch, module)
    if not isinstance(model, nn.Module) and sum(map(len, parts)) != items:
        parts = _outputs(model, batch, module)  # the first time that a model is run in parts these are compared
    if not parts or any(not isinstance(each, Tensor) or each.ndim != 3 for each in parts):
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in parts]
        raise ModelError(
            f"model: layer {layer!r} put out {shapes or 'nothing'}, not (items, tokens, width); use compile=False, and "
            "a layer that runs in every forward, such as a block"
        )
    found = torch.cat(parts)
    if len(found) != items:
        raise ModelError(f"model: layer {layer!r} runs {len(found) / (items or 1):g} times in a forward; name another")
    return found


def _outputs(model: Any, batch: Any, module: nn.Module) -> list[Any]:
    """What a module puts out in a forward, of every part of the batch where memory is short."""
    seen: list[Any] = []
    graded = torch.is_grad_enabled()

    def look(_: nn.Module, __: Any, output: Any) -> None:
        if torch.is_grad_enabled() == graded:  # parts are compared without gradients
            first = output[0] if isinstance(output, tuple | list) else output
            seen.append(getattr(first, "last_hidden_state", first))

    handle = module.register_forward_hook(look)
    try:
        model(**arguments(batch))
    finally:
        handle.remove()
    return seen


@lru_cache(maxsize=16)
def unit_vector(width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random vector of length 1, its entries uniform in [0, 1) before that, shape (width,)."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found: Tensor = drawn / torch.linalg.vector_norm(drawn)
    return found.to(device, dtype)


@dataclass(frozen=True)
class RMU:
    """Representation misdirection: forget items are pushed, within the model, to a random direction; others stay.

        rmu = fastlur.llm.RMU(layer=7)
        fastlur.unlearn(model, forget, retain, forget_loss=rmu.forget, loss=rmu.retain, parameters=["*layers.[567].*"])

    At the output of one layer, h, and at the places that predict a token that counts:

        forget: mean ‖h_θ − c·u‖² / width       u: a random vector of length 1, the same in the whole run
        retain: α · mean ‖h_θ − h_ref‖² / width

    Layers behind it get no gradient from either loss and do not move. The reference is the model as given.

    Source: arXiv 2403.03218; form and draw of u as in the authors' code (as taken over by locuslab/open-unlearning),
    which takes the mean over all tokens. c = 6.5 and α = 1200 are, by accounts, what it uses at layer 7 of Zephyr-7B; c
    has the scale of h, so that another model wants another one.

    Args:
        layer: a block's number, a module's name or a function: see `layer_of`.
        coefficient: c > 0.
        retain_weight: α > 0.
        seed: of u.
        keep: how the reference is kept, see `ReferenceKL`.

    Raises:
        ArgumentError: a value out of range.
    """

    layer: Layer
    coefficient: float = 6.5
    retain_weight: float = 1200.0
    seed: int = 0
    keep: Keep = "auto"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_range("coefficient", self.coefficient, low=1e-6, example=6.5)
        check_range("retain_weight", self.retain_weight, low=1e-6, example=1200)
        checks.seed(self.seed)
        check_keep(self.keep)

    @property
    def forget(self) -> Misdirected:
        """The forget loss."""
        return Misdirected(self.layer, self.coefficient, self.seed)

    @property
    def retain(self) -> Unmoved:
        """The retain loss."""
        return Unmoved(self.layer, self.retain_weight, self.keep)


@dataclass(frozen=True)
class Misdirected:
    """The forget loss of `RMU`, whose arguments it has."""

    layer: Layer
    coefficient: float
    seed: int

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Shape ()."""
        counts = _predicting(batch)
        found = wide(hidden(model, batch, self.layer))
        wanted = unit_vector(found.shape[-1], self.seed, found.dtype, found.device) * self.coefficient
        return _distance(found, wanted, counts)


@dataclass(frozen=True)
class Unmoved:
    """The retain loss of `RMU`, whose arguments it has; without a reference, compared with the model as it is now."""

    layer: Layer
    retain_weight: float
    keep: Keep
    reference: Reference | None = None

    def prepare(self, passes: Passes) -> Unmoved:
        """With the reference."""
        return replace(self, reference=Reference(passes, self.keep))

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Shape ()."""
        counts = _predicting(batch)
        layer, given = self.layer, None
        if self.reference is not None:
            given = self.reference.ask(lambda reference: hidden(alike(model, reference), batch, layer))
        found = hidden(model, batch, layer)
        wanted = found.detach() if given is None else given
        return self.retain_weight * _distance(wide(found), wide(wanted), counts)


def _predicting(batch: Any) -> Tensor:
    """Which places predict a token that counts, bool, shape (items, tokens)."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        raise DataError("forget/retain: batches of text must be dicts with 'labels' of shape (items, tokens)")
    return torch.cat((labels[:, 1:] != IGNORED, torch.zeros_like(labels[:, :1], dtype=torch.bool)), 1)


def _distance(found: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    each = (found - wanted).square().mean(-1)
    return torch.where(counts, each, 0.0).sum() / counts.sum().clamp(min=1)
