"""How much each weight matters to some data: the mean square of the gradient, a diagonal of the Fisher information."""

from __future__ import annotations

from typing import Any

import torch

from fastlur import ops
from fastlur.errors import NonFiniteError
from fastlur.passes import Passes, Which
from fastlur.space import Vector


def importance(passes: Passes, which: Which, batches: int | None, draw: object) -> tuple[Vector, int]:
    """Mean over batches of (∇L of the batch)², elementwise, in eval mode, L being the retain loss; and their number.

    Squares are taken of whole batches' gradients, as is usual where a pass an item would cost too much.

    Args:
        passes: the passes of the run; nothing of theirs is left changed.
        which: the side.
        batches: how many batches of it; None: all, each item once.
        draw: the same one draws the same batches.

    Raises:
        NonFiniteError: a gradient is not finite.
    """
    total, gradient, count = passes.space.vector(), passes.space.vector(), 0
    for batch in passes.feed.batches(which, batches, draw):
        side: dict[Which, Any] = {which: batch}
        with passes.aside(side):
            passes.gradient(which, gradient, loss=passes.losses["retain"], weight=1.0)
        with torch.no_grad():
            torch._foreach_addcmul_(total.flats, gradient.flats, gradient.flats)
        count += 1
    with torch.no_grad():
        torch._foreach_div_(total.flats, max(count, 1))
        if not torch.isfinite(ops.grad_dot(total.flats, total.flats)[0]).all():  # waits, but only before the steps
            raise NonFiniteError(f"{which}: a gradient of these data is not finite; the model is as it came")
    return total, count
