"""How much each weight matters to some data: the mean square of the gradient, a diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastlur.losses import IGNORED, split
from fastlur.methods.base import alike, check_finite
from fastlur.passes import Passes, Which
from fastlur.placement import mapped, tensors
from fastlur.space import Vector


def importance(
    passes: Passes, which: Which, batches: int | None, draw: object, group: int | None = None
) -> tuple[Vector, int]:
    """Mean over groups of items of (∇L of the group)², elementwise, in eval mode, L being the retain loss.

    Args:
        passes: the passes of the run; nothing of theirs is left changed.
        which: the side.
        batches: how many batches of it; None: all, each item once.
        draw: the same one draws the same batches.
        group: items a group. 1 gives the Fisher information of the true labels, for a pass an item. In larger groups
            the gradients of items cancel where these differ and add up where they are alike, as those of one class are.
            None: whole batches, a pass a batch.

    Returns:
        The mean, in float32 where the parameters have fewer bits, and over how many groups it was taken: those without
        a target that counts (all −100) are left out.

    Raises:
        NonFiniteError: a gradient is not finite.
    """
    total, gradient, count = passes.space.sums(), passes.space.vector(), 0
    for batch in passes.feed.batches(which, batches, draw):
        for part in groups(batch, group):
            if not _counts(part):
                continue
            side: dict[Which, Any] = {which: part}
            with passes.aside(side):
                passes.gradient(which, gradient, loss=passes.losses["retain"], weight=1.0)
            with torch.no_grad():
                found = alike(gradient.flats, total.flats)
                torch._foreach_addcmul_(total.flats, found, found)
            count += 1
    with torch.no_grad():
        torch._foreach_div_(total.flats, max(count, 1))
        check_finite(total, which)
    return total, count


def _counts(batch: Any) -> bool:
    targets = split(batch)[1]
    return not isinstance(targets, Tensor) or bool((targets != IGNORED).any())


def groups(batch: Any, size: int | None) -> Iterator[Any]:
    """A batch in parts of so many items; whole where its tensors do not have a row an item."""
    lengths = {tensor.shape[0] if tensor.dim() else -1 for tensor in tensors(batch)}
    if size is None or len(lengths) != 1 or -1 in lengths:
        yield batch
        return
    for start in range(0, lengths.pop(), size):
        yield _rows(batch, start, start + size)


def _rows(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop]
    return mapped(batch, lambda part: _rows(part, start, stop))
