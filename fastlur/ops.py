"""The vector operations of a step: their schemas, what they look like to a tracer, and how they are called.

Each operation is registered with torch as `torch.ops.fastlur.<name>`, so that `torch.compile` takes it as one node; the
functions here accept numbers where the schema wants device scalars, and call it. What an operation computes is defined
by its namesake in `fastlur.reference`; who computes it is decided in `fastlur.backends`.

Vectors are lists of tensors, or one tensor (a flat buffer). Tensors at the same place of several lists have the same
shape and dtype (a mask is bool), all are on one device; their strides may differ. Everything written is written in
place, and nothing else is. What is written shares memory with nothing, except that a tensor may be read at the very
place where it is written (`displace(theta, theta, d, alpha)`). All of this is checked: what does not fit is refused with
an ArgumentError, and nothing was written then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlur import reference
from fastlur.errors import ArgumentError
from fastlur.operands import Number, Operand, Vector, device_of, fit, hyper_parameters, listed, scalar
from fastlur.serving import Signature, call, serve

SCHEMAS = {
    "grad_dot": "(Tensor[] a, Tensor[] b) -> (Tensor, Tensor)",
    "displace": "(Tensor(a!)[] out, Tensor[] theta, Tensor[] d, Tensor alpha, Tensor? norm2) -> ()",
    "project": "(Tensor(a!)[] a, Tensor(b!)[] b, Tensor dots, str kind) -> ()",
    "regularize": ("(Tensor(a!)[] grad, Tensor[] theta, Tensor[]? theta0, Tensor[]? fisher, Tensor hyper) -> Tensor"),
    "step_control": "(Tensor(a!) control, Tensor dots, Tensor losses, Tensor hyper) -> ()",
    "meta_update": (
        "(Tensor(a!)[] theta, Tensor[] a, Tensor[]? u, Tensor(b!)[] moment1, Tensor(c!)[]? moment2, "
        "Tensor[]? theta0, Tensor[]? fisher, Tensor[]? mask, Tensor control, Tensor hyper) -> ()"
    ),
    "extrapolate": "(Tensor(a!)[] theta, Tensor[] theta0, Tensor[] memorised, Tensor alpha, Tensor eta) -> ()",
    "saliency": "(Tensor(a!)[] out, Tensor[] grad, Tensor[]? theta) -> ()",
}

_library: Any = torch.library.Library("fastlur", "DEF")  # type: ignore[no-untyped-call]


def _fake_grad_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    device = a[0].device if len(a) else "cpu"
    total, each = (torch.empty(shape, dtype=torch.float64, device=device) for shape in ((3,), (len(a), 3)))
    return total, each


def _fake_regularize(grad: Any, theta: Any, theta0: Any, fisher: Any, hyper: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=hyper.device)


_FAKES: dict[str, Callable[..., Any]] = {"grad_dot": _fake_grad_dot, "regularize": _fake_regularize}


def _register(name: str) -> None:
    _library.define(name + SCHEMAS[name], tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, partial(serve, _SIGNATURES[name]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlur::{name}", _FAKES.get(name, lambda *_: None), lib=_library)


_SIGNATURES = {name: Signature.of(name, schema) for name, schema in SCHEMAS.items()}
for _name in SCHEMAS:
    _register(_name)


def grad_dot(a: Vector, b: Vector) -> tuple[Tensor, Tensor]:
    """⟨a,b⟩, ‖a‖² and ‖b‖² in one read of both.

    Args:
        a: a vector.
        b: another of the same shapes and dtypes (it may be the same one).

    Returns:
        The three numbers in total, shape (3,), and per tensor, shape (len(a), 3), float64 on the device of the data.
        Partial sums are float32 (float64 for float64), in a fixed order: the same bits every time, whatever the number
        of threads.

    Note:
        Products are float32 too: of elements below 1e-19 or so they lose digits, below 1e-23 they are 0, and from
        1.8e19 on (sooner, where many are added up) they are infinite, though a float64 would hold them. By an infinite
        norm `displace` moves nothing, and `step_control` lowers its flag. ‖a + u‖² = ‖a‖² + 2⟨a,u⟩ + ‖u‖² has no
        digits left where it is a ten-millionth of ‖a‖² or less.

    Raises:
        ArgumentError: the vectors do not fit each other.
    """
    total, each = call(_SIGNATURES["grad_dot"], listed(a), listed(b))
    return total, each


def displace(out: Vector, theta: Vector, d: Vector, alpha: Number, norm2: Tensor | None = None) -> None:
    """out ← θ − αd, with α divided by the root of `norm2` if there is one.

    Args:
        out: written; may be `theta` or `d` itself.
        theta: the point.
        d: the vector to move along.
        alpha: a number or a 0-d tensor; with `norm2` the length of the step.
        norm2: ‖d‖², shape (), from `grad_dot`; where it is 0 or infinite the step is 0.

    Raises:
        ArgumentError: the vectors do not fit each other.
    """
    vectors = listed(out), listed(theta), listed(d)
    where = device_of(vectors[0])
    square = None if norm2 is None else scalar(norm2, where, "norm2")
    call(_SIGNATURES["displace"], *vectors, scalar(alpha, where, "alpha"), square)


def project(a: Vector, b: Vector, dots: Tensor, kind: str = "one_sided") -> None:
    """Remove the conflict between a and b in place, where ⟨a,b⟩ < 0; decided on the device.

    Sources: "one_sided" is LTU's harmonization (arXiv 2407.10494) and the projection of gradient rectification;
    "symmetric" is PCGrad's for two tasks (arXiv 2001.06782); "scissorhands" is the closed form of ScissorHands'
    quadratic programme with one memory (arXiv 2401.06187).

    Args:
        a: what is protected; "scissorhands": the memory's gradient. Changed by "symmetric" only.
        b: what gives way.
        dots: (⟨a,b⟩, ‖a‖², ‖b‖²), shape (3,), float64, as `grad_dot` gives them.
        kind: "one_sided", "symmetric" or "scissorhands".

    Raises:
        ArgumentError: the vectors do not fit each other, or there is no such kind.
    """
    if kind not in reference.PROJECTIONS:
        raise ArgumentError(f"kind={kind!r} is no projection; use one of {', '.join(reference.PROJECTIONS)}")
    call(_SIGNATURES["project"], listed(a), listed(b), dots, kind)


def regularize(
    grad: Vector,
    theta: Vector,
    theta0: Vector | None = None,
    fisher: Vector | None = None,
    *,
    l2: Number = 0.0,
    l1: Number = 0.0,
    prox: Number = 0.0,
) -> Tensor:
    """grad ← grad + ∇P(θ), P = ½·l2‖θ‖² + l1‖θ‖₁ + ½·prox·Σ F (θ − θ₀)².

    Args:
        grad: changed.
        theta: the point.
        theta0: centre of the proximal term; without it the term is absent.
        fisher: weights F of the proximal term, ≥ 0; without them 1.
        l2: factor ≥ 0, a number or a 0-d tensor.
        l1: likewise.
        prox: likewise.

    Returns:
        P(θ), shape (), float64.

    Raises:
        ArgumentError: the vectors do not fit each other, or `fisher` comes without `theta0`.
    """
    if fisher is not None and theta0 is None:
        raise ArgumentError("fisher: weights a proximal term that needs theta0 as well")
    vectors = listed(grad), listed(theta), listed(theta0), listed(fisher)
    hyper = hyper_parameters(device_of(vectors[0]), weight_decay=l2, l1=l1, prox=prox)
    value: Tensor = call(_SIGNATURES["regularize"], *vectors, hyper)
    return value


def step_control(control: Tensor, dots: Tensor, losses: Tensor, hyper: Tensor) -> None:
    """Decide on the device whether and how far a step goes; see `fastlur.reference.step_control`.

    Args:
        control: from `fastlur.operands.control_scalars`, changed: [OK, COUNT, SCALE].
        dots: of the two halves of the direction, shape (3,), float64.
        losses: any shape; one that is not finite lowers the flag for good.
        hyper: from `fastlur.operands.hyper_parameters`; its clip is the largest norm of the direction.

    Note:
        A norm counts as not finite from where the partial sums of `grad_dot` end: elements of 1.8e19 in float32 data
        lower the flag, though they are finite themselves. The norm that is clipped is made of the three dots, so that
        it is rough (anything from 0 to about 3e-4 of ‖a‖) where a ≈ −u cancel to that; the clip is then as rough.

    Raises:
        ArgumentError: something is no tensor, of another length or dtype, or on another device than `control`.
    """
    given = losses.detach().double() if isinstance(losses, Tensor) else losses
    call(_SIGNATURES["step_control"], control, dots, given, hyper)


def meta_update(
    theta: Vector,
    a: Vector,
    u: Vector | None,
    moment1: Vector,
    moment2: Vector | None = None,
    *,
    control: Tensor,
    hyper: Tensor,
    theta0: Vector | None = None,
    fisher: Vector | None = None,
    mask: Vector | None = None,
) -> None:
    """One optimizer step along a + u in one pass: combine, clip, regularise, mask, then SGD with momentum or AdamW.

    Args:
        theta: the weights, changed.
        a: one half of the direction.
        u: the other, or None.
        moment1: momentum, changed; zeros before the first step.
        moment2: None for SGD (weight decay is L2), second moments for AdamW (weight decay is decoupled), changed.
        control: what `step_control` decided. Where its flag is down nothing is written; where it counts no step yet,
            AdamW corrects its bias as in the first.
        hyper: the hyper-parameters packed as one device vector, as `fastlur.operands.hyper_parameters` packs them (lr,
            momentum, beta2, eps, weight_decay, l1, prox, clip; numbers or 0-d tensors). Kept from step to step it costs
            nothing, and is changed in place; numbers as such are not taken here.
        theta0: centre of a proximal term with factor prox; it joins the direction unclipped, as the L1 term does.
        fisher: weights of the proximal term.
        mask: bool; where it is False neither weights nor moments move, weight decay included.

    Raises:
        ArgumentError: the vectors do not fit each other, or `fisher` comes without `theta0`.
    """
    if fisher is not None and theta0 is None:
        raise ArgumentError("fisher: weights a proximal term that needs theta0 as well")
    vectors = (listed(each) for each in (theta, a, u, moment1, moment2, theta0, fisher, mask))
    call(_SIGNATURES["meta_update"], *vectors, control, hyper)


def extrapolate(theta: Vector, theta0: Vector, memorised: Vector, alpha: Number, eta: Number = 1.0) -> None:
    """θ ← η((1 + α)θ₀ − αθ_mem) + (1 − η)θ, MOX's step away from memorisation (arXiv 2602.06441).

    Args:
        theta: written; its values are used where η < 1.
        theta0: the reference.
        memorised: the weights after memorising.
        alpha: how far, in multiples of the way that memorising went.
        eta: momentum weight in (0, 1].

    Raises:
        ArgumentError: the vectors do not fit each other.
    """
    vectors = listed(theta), listed(theta0), listed(memorised)
    where = device_of(vectors[0])
    call(_SIGNATURES["extrapolate"], *vectors, scalar(alpha, where, "alpha"), scalar(eta, where, "eta"))


def saliency(out: Vector, grad: Vector, theta: Vector | None = None) -> None:
    """out ← |g·θ|, or |g| without `theta`.

    Raises:
        ArgumentError: the vectors do not fit each other.
    """
    call(_SIGNATURES["saliency"], listed(out), listed(grad), listed(theta))


def threshold(scores: Vector, sparsity: Number) -> Tensor:
    """The ⌊sparsity·N⌋-th smallest of all N scores (the smallest for 0), shape (), float64.

    Args:
        scores: a vector; NaN counts as largest.
        sparsity: in [0, 1]. The decimal digits count: 0.29 of 100 scores are 29. A 0-d tensor is waited for.

    Raises:
        ArgumentError: sparsity outside [0, 1], or no score at all.
    """
    every = listed(scores)
    fit((Operand("scores"),), (every,))
    share = _share(sparsity)
    if not 0 <= share <= 1:
        raise ArgumentError(f"sparsity={sparsity!r} must be in [0, 1]")
    if not any(each.numel() for each in every):
        raise ArgumentError("scores: hold nothing to find a threshold in")
    return reference.threshold([x.detach() for x in every], share)


def _share(sparsity: Number) -> float:
    """The float that prints as the number does: 0.29 in float32 is a little less, and would be 28 of 100 scores."""
    number: Any = sparsity
    if isinstance(sparsity, Tensor) and sparsity.dtype != torch.bfloat16 and not sparsity.is_meta:
        number = sparsity.detach().cpu().numpy()
    try:
        return float(str(number) if hasattr(number, "dtype") else number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"sparsity={sparsity!r} must be a number in [0, 1]") from error
