"""Whether and how far a step goes, decided by one program on the device.

OK ← OK·[all norms and losses are finite],  COUNT ← COUNT + OK
SCALE ← min(1, clip/‖a + u‖),  ‖a + u‖² = ‖a‖² + 2⟨a,u⟩ + ‖u‖²;  clip = 0 means none
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import OPTIONS, contiguous
from .layout import CLIP, COUNT, OK, SCALE


@triton.jit
def total(values, number, LANES: tl.constexpr):
    """Sum of a vector, in float64."""
    lanes = tl.arange(0, LANES)
    return tl.sum(tl.load(values + lanes, lanes < number, other=0).to(tl.float64))


@triton.jit(do_not_specialize=["number"])
def control_kernel(control, dots, losses, hyper, number, LANES: tl.constexpr):
    """Decide; one program."""
    ab = tl.load(dots)
    aa = tl.load(dots + 1)
    bb = tl.load(dots + 2)
    finite = tl.abs(ab + aa + bb + total(losses, number, LANES)) < float("inf")
    ok = tl.load(control + OK) * finite.to(tl.float64)
    tl.store(control + OK, ok)
    tl.store(control + COUNT, tl.load(control + COUNT) + ok)
    norm = tl.sqrt(tl.maximum(aa + 2 * ab + bb, 0.0))  # rounding may leave it below zero where a ≈ −u
    clip = tl.load(hyper + CLIP)
    cut = (clip > 0) & (norm > clip)
    tl.store(control + SCALE, tl.where(cut, clip / tl.where(cut, norm, 1.0), 1.0))


def step_control(control: Tensor, dots: Tensor, losses: Tensor, hyper: Tensor) -> None:
    """Change `control`, shape (3,), in place, from dots = (⟨a,u⟩, ‖a‖², ‖u‖²), the losses and hyper; all float64.

    control[OK] falls to 0 for good once a loss or a norm is not finite, control[COUNT] counts the steps taken, and
    control[SCALE] is the factor that brings ‖a + u‖ down to hyper[CLIP].
    """
    number = losses.numel()
    lists = ([control], [dots], [losses], [hyper])
    with contiguous(lists, written=1) as held, torch.cuda.device_of(control):
        tensors = [each[0] for each in held if each is not None]
        control_kernel[(1,)](*tensors, number, LANES=triton.next_power_of_2(max(number, 1)), num_warps=1, **OPTIONS)
