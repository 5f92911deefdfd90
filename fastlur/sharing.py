"""Whether operands of a vector operation share memory where one of them is written: told by arithmetic on strides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import gcd
from typing import Any

from torch import Tensor

from fastlur.errors import ArgumentError
from fastlur.memory import apart, reach
from fastlur.operands import Operand

# Steps of arithmetic that a call may take before it is refused unseen: some tenths of a second. Columns of a matrix and
# other parts of one tensor take next to none.
PATIENCE = 200_000
PAIR = 10  # steps that looking at two tensors is worth, however soon it ends

Span = tuple[int, int, int, int]  # first byte, byte behind the last, list, place


def refuse_overlaps(
    operands: Sequence[Operand],
    lists: Sequence[Sequence[Tensor] | None],
    scalars: Sequence[Operand] = (),
    values: Sequence[Any] = (),
) -> None:
    """Nothing that is written may share memory with anything but what is read at its own place of the lists.

    Args:
        operands: what the lists are called, and whether they are written.
        lists: of tensors.
        scalars: what the arguments beside the lists are called, and whether they are written.
        values: these arguments; what is no tensor is passed over.

    Raises:
        ArgumentError: two tensors overlap, one that is written overlaps itself, or it would take too long to tell.
    """
    everything: list[tuple[Operand, Sequence[Tensor]]] = [
        (operand, tensors or ()) for operand, tensors in zip(operands, lists, strict=True)
    ]
    everything += [(operand, [x]) for operand, x in zip(scalars, values, strict=True) if isinstance(x, Tensor)]
    alone = len(lists)  # from this number on a tensor is at no place of a list
    spans: list[Span] = []
    for number, (operand, tensors) in enumerate(everything):
        for place, tensor in enumerate(tensors):
            begin = tensor.data_ptr()
            size = tensor.nbytes
            if not tensor.is_contiguous():
                size = reach(tensor) * tensor.itemsize
                if operand.written and not apart(tensor):
                    name = _called(everything, alone, number, place)
                    raise ArgumentError(f"{name} has several elements in one place; write to a clone() of it")
            if size:
                spans.append((begin, begin + size, number, place))
    spans.sort()
    if all(each[1] <= following[0] for each, following in pairwise(spans)):
        return
    left = PATIENCE
    for one, two in _suspects(spans, everything):
        (begin, end, number, place), (other_begin, other_end, other_number, other_place) = one, two
        tensor, other = everything[number][1][place], everything[other_number][1][other_place]
        same = (begin, end, place) == (other_begin, other_end, other_place) and tensor.stride() == other.stride()
        if (
            same
            and max(number, other_number) < alone
            and not all(everything[n][0].written for n in (number, other_number))
        ):
            continue
        meets, left = _meet(tensor, other, left)
        if meets or left < 0:
            mine, theirs = (_called(everything, alone, *each[2:]) for each in (one, two))
            how = "overlap in memory" if meets else "lie in memory in too intricate a way to tell whether they overlap"
            raise ArgumentError(f"{mine} and {theirs} {how}, and one of them is written; pass a clone() of the other")


def _called(everything: Sequence[tuple[Operand, Sequence[Tensor]]], alone: int, number: int, place: int) -> str:
    name = everything[number][0].name
    return name if number >= alone else f"{name}[{place}]"


def _suspects(
    spans: Sequence[Span], everything: Sequence[tuple[Operand, Sequence[Tensor]]]
) -> Iterator[tuple[Span, Span]]:
    """Pairs, one of them written, whose extents overlap and that are not apart in every row of their matrix either.

    Args:
        spans: sorted.
        everything: what their numbers and places refer to.
    """
    cluster: list[Span] = []
    end = 0
    for span in (*spans, None):
        if span is not None and (not cluster or span[0] < end):
            cluster.append(span)
            end = max(end, span[1])
            continue
        if any(everything[each[2]][0].written for each in cluster) and len(cluster) > 1:
            yield from _crossing(_arcs(cluster, everything), everything)
        if span is not None:
            cluster, end = [span], span[1]


def _arcs(
    cluster: Sequence[Span], everything: Sequence[tuple[Operand, Sequence[Tensor]]]
) -> list[tuple[int, int, Span]]:
    """Where the spans lie modulo the length of a row that all strides are multiples of: (first, behind the last, span).

    Parts of one matrix lie in the same rows; columns, or halves of the columns, do not meet in any.
    """
    shapes = []
    for span in cluster:
        run, outer = _runs(everything[span[2]][1][span[3]])
        shapes.append((run, gcd(*outer)))
    period = gcd(*(outer for _, outer in shapes))
    found = []
    for span, (run, _) in zip(cluster, shapes, strict=True):
        begin, end = span[:2]
        if not period:
            found.append((begin, end, span))
        elif run >= period:
            found.append((0, period, span))
        else:
            first = begin % period
            found.append((first, min(first + run, period), span))
            if first + run > period:  # on into the next row
                found.append((0, first + run - period, span))
    return sorted(found)


def _runs(tensor: Tensor) -> tuple[int, list[int]]:
    """The bytes that lie one beside the other, and the strides, in bytes, at which such runs are repeated."""
    run, outer = tensor.itemsize, []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride:
            if stride * tensor.itemsize == run:
                run *= size
            else:
                outer.append(stride * tensor.itemsize)
    return run, outer


def _crossing(
    arcs: Iterable[tuple[int, int, Span]], everything: Sequence[tuple[Operand, Sequence[Tensor]]]
) -> Iterator[tuple[Span, Span]]:
    """Pairs of sorted arcs that overlap, as their spans do, and one of which is written."""
    open_written: list[tuple[int, Span]] = []
    open_read: list[tuple[int, Span]] = []
    for begin, end, span in arcs:
        open_written = [each for each in open_written if each[0] > begin]
        earlier = open_written
        mine = everything[span[2]][0].written
        if mine:
            open_read = [each for each in open_read if each[0] > begin]
            earlier = open_written + open_read
        for _, other in earlier:
            if other[0] < span[1] and span[0] < other[1] and other is not span:
                yield other, span
        (open_written if mine else open_read).append((end, span))


def _meet(x: Tensor, y: Tensor, patience: int) -> tuple[bool, int]:
    """Whether two tensors have a byte in common, and how much is left of the patience; below 0 it was not found out.

    A byte of x is at x₀ + Σ i·s + p, one of y at y₀ + Σ j·t + q. Both are the same where y₀ − x₀ is a sum of multiples
    of the strides within known bounds, and of p − q. From the largest stride down few multiples leave a rest that the
    others can make up for: two, where the strides are those of parts of one tensor.
    """
    bounds = {1: [1 - y.itemsize, x.itemsize - 1]}
    for tensor, side, sign in ((x, 1, 1), (y, 0, -1)):
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
            if size > 1 and stride:
                bounds.setdefault(stride * tensor.itemsize, [0, 0])[side] += sign * (size - 1)
    strides = sorted(bounds, reverse=True)
    below = [(0, 0)]  # what the strides from here on can add, least and most
    for stride in reversed(strides):
        least, most = bounds[stride]
        below.append((below[-1][0] + stride * least, below[-1][1] + stride * most))
    below.reverse()
    patience -= PAIR
    rests = [(0, y.data_ptr() - x.data_ptr())]
    while rests and patience >= 0:
        depth, rest = rests.pop()
        if depth == len(strides):
            return True, patience
        stride = strides[depth]
        (least, most), (low, high) = bounds[stride], below[depth + 1]
        first, last = max(least, -((high - rest) // stride)), min(most, (rest - low) // stride)
        patience -= max(0, last - first) + 1
        if patience >= 0:
            rests += [(depth + 1, rest - multiple * stride) for multiple in range(first, last + 1)]
    return False, patience
