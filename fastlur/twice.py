"""Convolution and batch norm that are cheap to differentiate twice: a Hessian-vector product for two passes.

torch's own second derivatives of these two are correct but dear: that of a convolution computes a weight gradient as a
convolution with the batch as channels and a kernel as large as the image, and that of batch norm walks over its
operands some thirty times. Inside `Twice`, `conv1d`, `conv2d`, `conv3d` and `batch_norm` in train mode run as functions
whose second derivatives use the kernels of the first; third ones (a loss with a gradient penalty) are right too, where
torch's own batch norm is not. Whatever is not of the plain kind goes to torch as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten: Any = torch.ops.aten


class Twice(TorchFunctionMode):
    """Inside, convolutions and batch norms of modules are those of this file."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the calls that can be; run every other as it is."""
        kwargs = kwargs or {}
        ours = REPLACED.get(func)
        found = None if ours is None or _transformed() else ours(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _transformed() -> bool:
    """Whether the loss transforms itself (vmap, jvp, dual numbers), for which the functions here have no rules."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """The convolution, or None where it is not of the plain kind."""
    if input.dim() != weight.dim() or isinstance(padding, str) or not _plain(input, weight):
        return None
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    size = weight.dim() - 2
    moves = [[each] * size if isinstance(each, int) else list(each) for each in (stride, padding, dilation)]
    if input.dtype != weight.dtype or any(len(each) != size for each in moves):
        return None
    found: Tensor = _Convolution.apply(input, weight, bias, (*moves, False, [0] * size, groups))  # type: ignore[no-untyped-call]
    return found


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch norm by the batch's own statistics, or None where it is another one."""
    if not training or weight is None or bias is None or input.dim() < 2 or not _plain(input, weight):
        return None
    if input.dtype != weight.dtype or input.dtype not in (torch.float32, torch.float64):
        return None
    if input.numel() <= input.shape[1]:
        return None
    found: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[no-untyped-call]
    return found


def _plain(input: Tensor, weight: Tensor) -> bool:
    known = (Tensor, torch.nn.Parameter)
    moves = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return moves and type(input) in known and type(weight) in known


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, how: Any) -> Any:
        ctx.save_for_backward(x, w)
        ctx.how, ctx.sizes = how, None if bias is None else list(bias.shape)
        return aten.convolution(x, w, bias, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        return (*_ConvolutionBackward.apply(g, x, w, ctx.how, mask, ctx.sizes), None)  # type: ignore[no-untyped-call]


class _ConvolutionBackward(torch.autograd.Function):
    """(Wᵀg, x⋆g, Σg); bilinear in g and the pair (x, W)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, how: Any, mask: list[bool], sizes: list[int] | None) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return aten.convolution_backward(g, x, w, sizes, *how, mask)

    @staticmethod
    def backward(ctx: Any, h: Tensor | None, v: Tensor | None, c: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        need_g, need_x, need_w = ctx.needs_input_grad[:3]
        to_g = to_x = to_w = None
        if need_g:
            if v is not None:
                to_g = aten.convolution(x, v, c, *ctx.how)
            elif c is not None:
                to_g = c.view(-1, *[1] * (g.dim() - 2)).expand_as(g).clone()
            if h is not None:
                more = aten.convolution(h, w, None, *ctx.how)
                to_g = more if to_g is None else to_g.add_(more)
        if v is not None and need_x:
            to_x = aten.convolution_backward(g, x, v, None, *ctx.how, [True, False, False])[0]
        if h is not None and need_w:
            to_w = aten.convolution_backward(g, h, w, None, *ctx.how, [False, True, False])[1]
        return to_g, to_x, to_w, None, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor, mean: Any, var: Any, momentum: float, eps: float) -> Any:
        y, of_batch, inverse = aten.native_batch_norm(x, w, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, w, of_batch, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w, mean, inverse = ctx.saved_tensors
        found = _BatchNormBackward.apply(g, x, w, mean, inverse, ctx.eps)  # type: ignore[no-untyped-call]
        return (*found, None, None, None, None)


class _BatchNormBackward(torch.autograd.Function):
    """(w s Pg, ⟨g, x̂⟩, Σg) a channel: x̂ = (x − mean) s, s = (var + eps)^-½, P takes 1 and x̂ out of its operand.

    For cotangents (h, v, c) and n elements a channel, P symmetric, k = ⟨h, Pg⟩ = ⟨h, g⟩ − (ΣhΣg + ⟨h, x̂⟩⟨g, x̂⟩)/n:
        to g: w s Ph + v x̂ + c, where the same kernel gives the first term, ⟨h, x̂⟩ and Σh
        to w: s k
        to x: s Pq − (w k s²/n) x̂, q = (v − w s⟨h, x̂⟩/n) g − (w s⟨g, x̂⟩/n) h
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Any:
        found = aten.native_batch_norm_backward(g, x, w, None, None, mean, inverse, True, eps, [True] * 3)
        ctx.save_for_backward(g, x, w, mean, inverse, *found[1:])
        ctx.eps = eps
        return found

    @staticmethod
    def backward(ctx: Any, h: Tensor, v: Tensor, c: Tensor) -> Any:
        g, x, w, mean, s, gx, g1 = ctx.saved_tensors  # gx = ⟨g, x̂⟩, g1 = Σg, and hx, h1 alike
        n = x.numel() // x.shape[1]
        to_g, hx, h1 = aten.native_batch_norm_backward(h, x, w, None, None, mean, s, True, ctx.eps, [True] * 3)
        over = [d for d in range(x.dim()) if d != 1]
        if torch.is_grad_enabled():  # a third derivative is wanted: the statistics must be seen to depend on x
            mean, s = x.mean(over), (x.var(over, correction=0) + ctx.eps).rsqrt()
        to_g.addcmul_(x, _wide(v * s, x)).add_(_wide(c - v * s * mean, x))
        k = (h * g).sum(over) - (h1 * g1 + hx * gx) / n
        on_h, on_g = -w * s * gx / n, v - w * s * hx / n
        on_x = -s * (s * (on_h * hx + on_g * gx) + w * k * s * s) / n  # on x itself: x̂ = s (x − mean)
        constant = -s * (on_h * h1 + on_g * g1) / n - on_x * mean
        to_x = (h * _wide(s * on_h, x)).addcmul_(g, _wide(s * on_g, x)).addcmul_(x, _wide(on_x, x))
        return to_g, to_x.add_(_wide(constant, x)), s * k, None, None, None


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (like.dim() - 2))


REPLACED: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.conv1d: _convolution,
    functional.conv2d: _convolution,
    functional.conv3d: _convolution,
    functional.batch_norm: _batch_norm,
}
