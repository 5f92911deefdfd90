"""How the operands of a vector operation lie in memory, and dense tensors seen as flat ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def flattened(lists: Sequence[Sequence[Tensor] | None]) -> Sequence[Sequence[Tensor] | None]:
    """The lists, in which tensors of one place that lie in memory alike and without gaps are flat views of it.

    Every operation goes element by element, so that the order of the elements is of no consequence as long as all
    operands have the same: channels_last or transposed tensors then cost no copies. Contiguous ones stay as they are.
    """
    scattered = {i for each in lists if each for i, tensor in enumerate(each) if not tensor.is_contiguous()}
    if not scattered:
        return lists
    found = [None if each is None else list(each) for each in lists]
    given = [each for each in found if each is not None]
    for place in scattered:
        column = [each[place] for each in given]
        strides = column[0].stride()
        if _dense(column[0]) and all(tensor.stride() == strides for tensor in column):
            for each in given:
                tensor = each[place]
                each[place] = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return found


def reach(tensor: Tensor) -> int:
    """The elements from the first to the last in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie in memory one beside the other, in whatever order."""
    return reach(tensor) == tensor.numel() and apart(tensor)


def apart(tensor: Tensor) -> bool:
    """Whether every element has a place of its own, as far as sizes and strides tell."""
    end = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= end:
            return False
        end += (size - 1) * stride
    return True
