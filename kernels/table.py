"""How a kernel finds its data: one launch serves all tensors of one dtype, whether one flat buffer or a list.

A kernel is given the first tensor of each list. For a flat buffer that pointer is all it needs. For a list there is,
besides, a table on the device, int64, with one column a tensor and the rows

    first program | number of elements | address in list 0 | address in list 1 | …

and `owner`, int32, the column that each program works on; the pointer given then tells only the type of its list.
Tables are kept by the addresses they hold, so that a step that sees the same tensors again allocates nothing and can
be captured in a CUDA graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

Lists: TypeAlias = Sequence[Sequence[Tensor] | None]

KEPT = 64  # tables; a step needs fewer than ten
ROWS = tl.constexpr(2)  # of the table that stand before the addresses
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A size that Triton specialises on (1, multiples of 16) would compile a kernel again and make no access wider: whole
# blocks are read without a mask, whatever the size.
jit = triton.jit(do_not_specialize=["width", "size"])


@triton.jit
def locate(table, owner, width, size):
    """The column of this program, its number among the programs of that tensor, and the tensor's size, all int64."""
    program = tl.program_id(0).to(tl.int64)
    if table is None:
        column = program * 0
        length = size.to(tl.int64)
    else:
        column = tl.load(owner + program).to(tl.int64)
        program -= tl.load(table + column)
        length = tl.load(table + width + column)
    return column, program, length


@triton.jit
def pointer(given, table, width, column, ROW: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the tensor of this program begins, in list number ROW; None for a list that is absent."""
    if given is None or table is None:
        found = given
    else:
        address = tl.load(table + (ROW + ROWS) * width + column)
        found = address.to(given.dtype)
        if ALIGNED:
            found = tl.multiple_of(found, 16)
    return found


@triton.jit
def read(pointer, offsets, mask, COMPUTE: tl.constexpr):
    """The elements in the precision of the computation, 0 beyond the end; None for a list that is absent."""
    if pointer is None:
        values = None
    elif mask is None:
        values = tl.load(pointer + offsets).to(COMPUTE)
    else:
        values = tl.load(pointer + offsets, mask, other=0).to(COMPUTE)
    return values


@dataclass(frozen=True)
class Group:
    """The tensors of one combination of dtypes: what one launch works on. Holds addresses, never the tensors."""

    first: int  # place in the lists of a tensor of this group
    origin: int  # number of programs in the groups before
    programs: int
    size: int  # of the one tensor; 0 where there is a table
    table: Tensor | None
    owner: Tensor | None
    width: int
    aligned: bool
    compute: tl.dtype


@dataclass(frozen=True)
class Plan:
    """All launches of one operation; `ranges` are the programs of each tensor, (tensors, 2) int64: first and number."""

    groups: tuple[Group, ...]
    programs: int
    ranges: Tensor | None


_kept: OrderedDict[Any, Plan] = OrderedDict()
_captured: dict[Any, Plan] = {}  # read by a CUDA graph for as long as that lives, hence never dropped


def plan(lists: Lists, block: int, limit: int | None = None) -> Plan:
    """The launches that serve these lists, `block` elements a program and step, at most `limit` programs a tensor."""
    device = next(tensor.device for each in lists if each for tensor in each)
    key = (
        block,
        limit,
        device,
        tuple(None if each is None else tuple((x.data_ptr(), x.numel(), x.dtype) for x in each) for each in lists),
    )
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _captured.get(key) or _kept.get(key)
    if found is None:
        found = _plan(lists, block, limit, device, capturing)
    if capturing:
        _captured[key] = found
    _kept[key] = found
    _kept.move_to_end(key)
    if len(_kept) > KEPT:
        _kept.popitem(last=False)
    return found


def _plan(lists: Lists, block: int, limit: int | None, device: torch.device, capturing: bool) -> Plan:
    columns = list(zip(*[each for each in lists if each is not None], strict=True))
    kinds: dict[tuple[torch.dtype, ...], list[int]] = {}
    for place, column in enumerate(columns):
        if any(x.device != device or x.numel() != column[0].numel() for x in column):
            raise ValueError(f"tensors number {place} differ in size, or are not all on {device}")
        if any(x.dtype not in (*FLOATS, torch.uint8) for x in column):
            raise TypeError(
                f"tensors number {place} are {[x.dtype for x in column]}; the kernels compute with {FLOATS}"
            )
        if column[0].numel():
            kinds.setdefault(tuple(x.dtype for x in column), []).append(place)
    if capturing and len(columns) > 1:
        raise RuntimeError("these lists of tensors are new: call once with the same tensors before capturing a graph")
    ranges, groups, origin = [[0, 0] for _ in columns], [], 0
    for dtypes, places in kinds.items():
        sizes = [columns[place][0].numel() for place in places]
        counts = [min(limit or size, -(-size // block)) for size in sizes]
        rows = [[0] * len(places) if each is None else [each[place].data_ptr() for place in places] for each in lists]
        first = list(accumulate(counts, initial=0))[:-1]
        for place, start, count in zip(places, first, counts, strict=True):
            ranges[place] = [origin + start, count]
        many = len(places) > 1
        group = Group(
            first=places[0],
            origin=origin,
            programs=sum(counts),
            size=0 if many else sizes[0],
            table=torch.tensor([first, sizes, *rows], dtype=torch.int64, device="cpu").to(device) if many else None,
            owner=torch.arange(len(places), dtype=torch.int32, device="cpu")
            .repeat_interleave(torch.tensor(counts, device="cpu"))
            .to(device)
            if many
            else None,
            width=len(places),
            aligned=many and not any(address % 16 for row in rows for address in row),
            compute=tl.float64 if torch.float64 in dtypes else tl.float32,
        )
        groups.append(group)
        origin += group.programs
    starts = torch.tensor(ranges, dtype=torch.int64, device="cpu").to(device) if len(columns) > 1 else None
    return Plan(tuple(groups), origin, starts)
