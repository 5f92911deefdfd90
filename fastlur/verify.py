"""Whether a record is what was written, and whether it speaks of these items."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlur import content
from fastlur.data import source
from fastlur.errors import ArgumentError, RecordError, told
from fastlur.fingerprints import check_key, keyed
from fastlur.record import Record, read
from fastlur.world import borrowed_random, derive


@dataclass(frozen=True)
class Match:
    """How the items given compare with those of the record, distinct ones counted.

    Attributes:
        given: how many were given.
        recorded: how many the record has.
        common: how many of them are the same.
    """

    given: int
    recorded: int
    common: int

    @property
    def exact(self) -> bool:
        """Whether they are the same, no more and no fewer."""
        return self.given == self.recorded == self.common

    def __str__(self) -> str:
        if self.exact:
            return f"the {self.recorded} given are those of the record"
        return f"of {self.given} given {self.common} are in the record, which has {self.recorded}"


@dataclass(frozen=True)
class Verification:
    """An intact record, and how the data given compare with it.

    Attributes:
        record: what it says.
        matches: by side, of the sides that were given.
    """

    record: Record
    matches: dict[str, Match] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all data given are exactly those of the record."""
        return all(match.exact for match in self.matches.values())

    def __str__(self) -> str:
        said = self.record.content
        method, version = _told(said, "settings", "method", "name"), _told(said, "versions", "fastlur")
        lines = [f"{self.record.path}: intact; {method} by fastlur {version}"]
        lines += [f"{side}: {match}" for side, match in self.matches.items()]
        statement = said.get("statement")
        told = [_told({"": each}, "") for each in statement] if isinstance(statement, list) else []
        return "\n".join(lines + [f"- {line}" for line in told])


def _told(content: Any, *path: str) -> str:
    """A text in a record, which somebody else may have written: on one line, and nothing that a terminal obeys."""
    for part in path:
        content = content.get(part) if isinstance(content, dict) else None
    return "".join(c if c.isprintable() else "?" for c in content) if isinstance(content, str) else ""


def verify(
    directory: str | os.PathLike[str], *, forget: Any = None, retain: Any = None, key: Any = None
) -> Verification:
    """Compare a record's checksums and, given data and the key, whether they are the ones it speaks of.

    The order of the data does not matter, unless there were so many to decode that only some were hashed: then pass
    them as they were passed to `unlearn`. A part of them tells how many of these items the record has.

    Args:
        directory: of the record.
        forget: data, as `unlearn` takes them.
        retain: likewise.
        key: `result.key`, or the path of the file that `save(key_file=…)` wrote.

    Raises:
        RecordError: there is no record, or it is not intact.
        ArgumentError: data without a key, or something that is no key.
        DataError: data that cannot be read.
    """
    record = read(directory)
    given = {side: data for side, data in (("forget", forget), ("retain", retain)) if data is not None}
    if not given:
        return Verification(record)
    if key is None:
        raise ArgumentError("key: the hashes are keyed; pass `result.key`, or the path of the file it was written to")
    key, said = check_key(key), record.content
    try:
        recorded = {side: set(said["data"][side]["hashes"]) for side in given}
        size, seed = said["settings"]["batch_size"], said["settings"]["seed"]
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"a batch size of {size!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"record {os.fspath(directory)!r} has no hashes to compare with ({error})") from error
    matches = {}
    for side, data in given.items():
        hashes = _hashes(data, side, size, derive(seed, "look", side))
        mine = set(keyed(hashes, side, key))
        matches[side] = Match(len(mine), len(recorded[side]), len(mine & recorded[side]))
    return Verification(record, matches)


def _hashes(data: Any, side: str, batch_size: int, seed: int) -> set[bytes]:
    with borrowed_random(torch.device("cpu")), told(RecordError, f"{side}: the data cannot be read"):
        return content.read(source(data, side, batch_size), side, seed).hashes
