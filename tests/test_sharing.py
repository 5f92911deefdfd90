"""Whether tensors share memory: the verdict of brute force, at a cost that does not grow with the elements."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastlur
from fastlur import backends, ops, sharing
from fastlur.memory import apart
from fastlur.operands import Operand

OUT, READ = Operand("out", written=True), Operand("theta")


def bytes_of(tensor: Tensor) -> set[int]:
    places = {tensor.data_ptr()}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = {place + i * stride * tensor.itemsize for place in places for i in range(size)}
    return {place + i for place in places for i in range(tensor.itemsize)} if tensor.numel() else set()


def drawn(memory: Tensor, choose: random.Random) -> Tensor:
    """Some strided part of it, seen in some width."""
    base = memory.view(choose.choice([torch.uint8, torch.int16, torch.float32, torch.float64]))
    shape = [choose.choice([1, 1, 2, 3, 4]) for _ in range(choose.randint(1, 3))]
    stride = [choose.choice([0, 1, 2, 3, 4, 6, 8, 12]) for _ in shape]
    room = base.numel() - 1 - sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return base.as_strided(shape, stride, choose.randint(0, room)) if room >= 0 else base[:1]


def test_two_tensors_meet_where_they_have_a_byte_in_common():
    choose, memory = random.Random(0), torch.zeros(28, dtype=torch.float64)
    verdicts = []
    for _ in range(3000):
        x, y = drawn(memory, choose), drawn(memory, choose)
        meets, left = sharing._meet(x, y, sharing.PATIENCE)
        assert left > 0 and meets == bool(bytes_of(x) & bytes_of(y)), (x.stride(), y.stride())
        verdicts.append(meets)
    assert 500 < sum(verdicts) < 2500


@pytest.mark.parametrize("parts", [2, 5])
def test_what_is_refused_is_what_brute_force_finds(parts):
    """Of lists in which some tensors are written: none of those may meet another."""
    choose, memory = random.Random(parts), torch.zeros(28, dtype=torch.float64)
    verdicts = []
    for _ in range(1000):
        tensors = [drawn(memory, choose) for _ in range(parts)]
        written = [x for x in tensors[: parts // 2] if apart(x)]
        read = tensors[parts // 2 :]
        every = [bytes_of(x) for x in written + read]
        meet = any(every[i] & every[j] for i in range(len(written)) for j in range(i + 1, len(every)))
        try:  # as scalars, so that no two of them are at the same place
            sharing.refuse_overlaps((), (), [OUT] * len(written) + [READ] * len(read), written + read)
        except fastlur.ArgumentError:
            verdicts.append(True)
        else:
            verdicts.append(False)
        assert verdicts[-1] == meet
    assert 100 < sum(verdicts) < 900


def columns(rows: int, count: int) -> list[Tensor]:
    return list(torch.zeros(rows, count).unbind(1))


def chequered() -> list[Tensor]:
    """The four colours of a matrix's places, every other row and column, and the columns of a second matrix."""
    x = torch.zeros(40, 50)
    return [x[i::2, j::2] for i in range(2) for j in range(2)] + columns(3, 4)


PARTS = {
    "columns": lambda: columns(64, 400),
    "halves": lambda: [*torch.zeros(4000, 4000).split(2000, 1)],
    "columns of rows": lambda: [x[half::2] for x in columns(6, 100) for half in range(2)],
    "blocks": lambda: [x for rows in torch.zeros(60, 60).split(6) for x in rows.split(7, 1)],
    "slices of the last axis": lambda: [*torch.zeros(30, 20, 10).unbind(-1)],
    "chequered": chequered,
}


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_one_matrix_are_told_apart_without_being_compared_one_by_one(parts):
    """Nor are their elements counted: the verdict is one of a few sums, where pairs would be tens of thousands."""
    tensors = PARTS[parts]()
    with mock.patch.object(sharing, "_meet", wraps=sharing._meet) as compared:
        sharing.refuse_overlaps([OUT, READ], [tensors, tensors])
        assert compared.call_count <= len(tensors)
        last = [*tensors[:-1], tensors[-1][..., :-1].contiguous()]
        with pytest.raises(fastlur.ArgumentError, match=r"overlap in memory"):
            sharing.refuse_overlaps([OUT, READ], [last, [*last[:-1], tensors[0][..., :1]]])


def test_many_reads_of_one_tensor_are_not_compared_with_each_other():
    out, one = list(torch.zeros(3000, 2).unbind(0)), torch.zeros(2)
    with mock.patch.object(sharing, "_meet", wraps=sharing._meet) as compared:
        sharing.refuse_overlaps([OUT, READ], [out, [one] * 3000])
        assert not compared.called
        sharing.refuse_overlaps([OUT, READ], [columns(9, 300), list(torch.zeros(9, 2).unbind(1)) * 150])
        assert not compared.called


def test_what_takes_too_long_to_tell_is_refused(monkeypatch):
    memory = torch.zeros(10_000)
    x, y = memory.as_strided((7, 7, 7), (700, 90, 13)), memory[10:].as_strided((7, 7, 7), (710, 91, 12))
    theta = torch.zeros(7, 7, 7)
    with monkeypatch.context() as patch, backends.backend("torch"):
        patch.setattr(sharing, "PATIENCE", 12)
        with pytest.raises(
            fastlur.ArgumentError, match=r"too intricate a way to tell whether they overlap.*pass a clone"
        ):
            sharing.refuse_overlaps([OUT, READ], [[x], [y]])
        ops.displace(theta, x, y, 0.5)  # nothing of it is written
    assert bytes_of(x) & bytes_of(y)
    with pytest.raises(fastlur.ArgumentError, match="overlap in memory"):
        sharing.refuse_overlaps([OUT, READ], [[x], [y]])
