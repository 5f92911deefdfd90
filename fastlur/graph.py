"""What stands behind a tensor in autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def nodes(*outputs: Tensor) -> Iterator[Any]:
    """Every node of the graph behind some tensors, once."""
    seen: set[object] = set()
    waiting: list[Any] = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def ends(*outputs: Tensor) -> Iterator[Tensor]:
    """The leaf tensors of the graph behind some tensors."""
    return (node.variable for node in nodes(*outputs) if hasattr(node, "variable"))
