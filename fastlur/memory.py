"""Where the operands of a vector operation lie: overlaps are refused, and dense tensors are seen as flat ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor

from fastlur.errors import ArgumentError
from fastlur.operands import Operand


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


def refuse_overlaps(
    operands: Sequence[Operand], lists: Sequence[Sequence[Tensor] | None], scalars: Sequence[Tensor] = ()
) -> None:
    """Nothing that is written may share memory with anything but what is read at its own place.

    Args:
        operands: what the lists are called, and whether they are written.
        lists: of tensors.
        scalars: what is read besides.

    Raises:
        ArgumentError: two tensors overlap, or one that is written overlaps itself.
    """
    everything = [*zip(operands, lists, strict=True), (Operand("scalar"), scalars)]
    spans = []  # first byte, byte behind the last, list, place
    for number, (operand, tensors) in enumerate(everything):
        for place, tensor in enumerate(tensors or ()):
            begin = tensor.data_ptr()
            size = tensor.nbytes
            if not tensor.is_contiguous():
                size = _reach(tensor) * tensor.itemsize
                if operand.written and not _apart(tensor):
                    raise ArgumentError(
                        f"{operand.name}[{place}] has several elements in one place; write to a clone() of it"
                    )
            if size:
                spans.append((begin, begin + size, number, place))
    spans.sort()
    if all(each[1] <= following[0] for each, following in pairwise(spans)):
        return
    for index, (begin, end, number, place) in enumerate(spans):
        for other_begin, other_end, other_number, other_place in islice(spans, index + 1, None):
            if other_begin >= end:
                break
            (mine, tensors), (theirs, others) = everything[number], everything[other_number]
            if not mine.written and not theirs.written:
                continue
            tensor, other = (tensors or ())[place], (others or ())[other_place]
            same = (begin, end, place) == (other_begin, other_end, other_place) and tensor.stride() == other.stride()
            if (same and mine.written != theirs.written) or _interleaved(tensor, other):
                continue
            raise ArgumentError(
                f"{mine.name}[{place}] and {theirs.name}[{other_place}] overlap in memory, and one of them is written; "
                "pass a clone() of the other"
            )


def _interleaved(x: Tensor, y: Tensor) -> bool:
    """Whether elements lie between those of the other tensor, like the columns of a matrix, and none in its place."""
    distance = y.data_ptr() - x.data_ptr()
    if (x.is_contiguous() and y.is_contiguous()) or x.itemsize != y.itemsize or distance % x.itemsize:
        return False
    return not bool(torch.isin(_elements(x), _elements(y) + distance // x.itemsize).any())


def _elements(tensor: Tensor) -> Tensor:
    """The distance of every element from the first."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found[:, None] + torch.arange(size, device="cpu") * stride).reshape(-1)
    return found


def _reach(tensor: Tensor) -> int:
    """The elements from the first to the last in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _dense(tensor: Tensor) -> bool:
    """Whether the elements lie in memory one beside the other, in whatever order."""
    return _reach(tensor) == tensor.numel() and _apart(tensor)


def _apart(tensor: Tensor) -> bool:
    """Whether every element has a place of its own, as far as sizes and strides tell."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True
