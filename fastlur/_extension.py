"""The compiled extension: found and loaded on demand, with the signatures of `fastlur.reference`.

The extension is optional. `load` says in words why it is not there; nothing else may be called before it has succeeded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

NAMESPACE = "fastlur_ext"
KINDS = ("one_sided", "symmetric", "scissorhands")

Tensors = Sequence[Tensor]

_failure: str | None = "not loaded yet"


def load(path: str | os.PathLike[str] | None = None) -> str | None:
    """Load the shared library once; None when it is there, otherwise the reason why not.

    Args:
        path: The library to load. By default the one that FASTLUR_EXT_PATH names, else the one beside this file.
    """
    global _failure
    if _failure is None:
        return None
    named = path or os.environ.get("FASTLUR_EXT_PATH")
    found = [Path(named)] if named else sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        _failure = "it was not built; with a C++ compiler, `make ext` builds it"
        return _failure
    try:
        torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:  # a missing file or symbol; a library made for another machine or torch
        _failure = f"{found[0]} cannot be loaded: {error}"
        return _failure
    _failure = None
    return None


def loaded() -> bool:
    """Whether the library is there already."""
    return _failure is None


def missing(device: str = "cpu") -> str | None:
    """Why the extension cannot serve tensors on `device` ("cpu" or "cuda"); None when it can."""
    failure = load()
    if failure is not None:
        return failure
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::grad_dot", key):
        return f"it was built without {device} kernels"
    return None


def _value(tensor: Tensor) -> Tensor:
    """The values alone, contiguous; the tensor itself where it is that already, as it mostly is."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _read(tensors: Tensors) -> list[Tensor]:
    return [_value(tensor) for tensor in tensors]


def _maybe(tensors: Tensors | None) -> list[Tensor] | None:
    return None if tensors is None else [_value(tensor) for tensor in tensors]


def _wrote(tensors: Tensors | None, values: list[Tensor] | None) -> None:
    """What was written to `values` reaches the tensors given, and autograd is told."""
    if tensors is None or values is None:
        return
    for tensor, value in zip(tensors, values, strict=True):
        if not tensor.is_contiguous():
            tensor.detach().copy_(value)
    # a graph that saved one of these values must fail at its backward, as after any in-place operation of torch
    increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def grad_dot(a: Tensors, b: Tensors) -> tuple[Tensor, Tensor]:
    """⟨a,b⟩, ‖a‖² and ‖b‖²: in total, shape (3,), and per tensor, shape (len(a), 3), both float64."""
    if not a and not b:
        total, each = (torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in ((3,), (0, 3)))
        return total, each
    total, each = torch.ops.fastlur_ext.grad_dot(_read(a), _read(b))
    return total, each


def displace(out: Tensors, theta: Tensors, d: Tensors, alpha: Tensor, norm2: Tensor | None = None) -> None:
    """out ← θ − αd; with `norm2` = ‖v‖² of some v, α is divided by ‖v‖, and is 0 where that norm is 0."""
    o = _read(out)
    torch.ops.fastlur_ext.displace(o, _read(theta), _read(d), _value(alpha), norm2 if norm2 is None else _value(norm2))
    _wrote(out, o)


def step_control(control: Tensor, dots: Tensor, losses: Tensor, hyper: Tensor) -> None:
    """Decide, on the device, whether and how far a step goes; `control` is changed in place."""
    c = _value(control)
    torch.ops.fastlur_ext.step_control(c, _value(dots), _value(losses), _value(hyper))
    _wrote([control], [c])


def regularize(grad: Tensors, theta: Tensors, theta0: Tensors | None, fisher: Tensors | None, hyper: Tensor) -> Tensor:
    """grad ← grad + ∇P(θ); returns P(θ), shape (), float64."""
    g = _read(grad)
    value: Tensor = torch.ops.fastlur_ext.regularize(g, _read(theta), _maybe(theta0), _maybe(fisher), _value(hyper))
    _wrote(grad, g)
    return value


def meta_update(
    theta: Tensors,
    a: Tensors,
    u: Tensors | None,
    moment1: Tensors,
    moment2: Tensors | None,
    theta0: Tensors | None,
    fisher: Tensors | None,
    mask: Tensors | None,
    control: Tensor,
    hyper: Tensor,
) -> None:
    """One optimizer step along a + u: clip, regularise, mask, then SGD with momentum or AdamW, in place."""
    keep = None if mask is None else [each.bool() for each in mask]  # itself, where it is bool
    t, m1, m2 = _read(theta), _read(moment1), _maybe(moment2)
    torch.ops.fastlur_ext.meta_update(
        t, _read(a), _maybe(u), m1, m2, _maybe(theta0), _maybe(fisher), _maybe(keep), _value(control), _value(hyper)
    )
    for tensors, values in ((theta, t), (moment1, m1), (moment2, m2)):
        _wrote(tensors, values)


def project(a: Tensors, b: Tensors, dots: Tensor, kind: str) -> None:
    """Remove the conflict between a and b, in place: a ← a + s·b and b ← b + t·a, both from the values given."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no projection; use 'one_sided', 'symmetric' or 'scissorhands'")
    if not a and not b:
        return
    x, y = _read(a), _read(b)
    torch.ops.fastlur_ext.project(x, y, _value(dots), kind)
    _wrote(a, x)
    _wrote(b, y)


def extrapolate(theta: Tensors, theta0: Tensors, memorised: Tensors, alpha: Tensor, eta: Tensor) -> None:
    """θ ← η((1 + α)θ₀ − αθ_mem) + (1 − η)θ; at η = 1 the θ given is not used."""
    t = _read(theta)
    torch.ops.fastlur_ext.extrapolate(t, _read(theta0), _read(memorised), _value(alpha), _value(eta))
    _wrote(theta, t)


def saliency(out: Tensors, grad: Tensors, theta: Tensors | None) -> None:
    """out ← |g·θ|, or |g| without `theta`."""
    if not out and not grad:
        return
    o = _read(out)
    torch.ops.fastlur_ext.saliency(o, _read(grad), _maybe(theta))
    _wrote(out, o)
