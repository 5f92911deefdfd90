"""From lists of tensors to launches: copies where they are not contiguous, then one launch a group of dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .table import Group, Lists, plan

WARPS = 8

# Asked for by name, because the default differs between versions of Triton, and with it the last bit of a result.
OPTIONS = {"enable_fp_fusion": True}


@contextmanager
def contiguous(lists: Lists, written: int) -> Iterator[list[list[Tensor] | None]]:
    """The lists with copies where a tensor is not contiguous; the first `written` lists are copied back at the end."""
    held = [None if each is None else [x.contiguous() for x in each] for each in lists]
    yield held
    for each, copies in zip(lists[:written], held[:written], strict=True):
        for tensor, copy in zip(each or (), copies or (), strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def run(kernel: Callable[..., Any], lists: Lists, group: Group, scalars: Sequence[Any], **constants: Any) -> None:
    """Launch the kernel on one group: pointers, then what is not a list, then the table."""
    pointers = [None if each is None else each[group.first] for each in lists]
    with torch.cuda.device_of(next(x for x in pointers if x is not None)):
        kernel[(group.programs,)](
            *pointers,
            *scalars,
            group.table,
            group.owner,
            group.width,
            group.size,
            COMPUTE=group.compute,
            ALIGNED=group.aligned,
            num_warps=WARPS,
            **OPTIONS,
            **constants,
        )


def elementwise(
    kernel: Callable[..., Any],
    lists: Lists,
    scalars: Sequence[Tensor | None],
    *,
    written: int,
    block: int,
    **constants: Any,
) -> None:
    """Run the kernel over lists of which the first `written` are changed; empty lists are left alone."""
    if not any(each for each in lists):
        return
    with contiguous(lists, written) as held:
        for group in plan(held, block).groups:
            run(kernel, held, group, scalars, BLOCK=block, **constants)
