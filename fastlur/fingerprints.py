"""Keyed hashes of data: a record can later be held against the items, but only by whoever has the key.

A plain hash would let anybody who has the record try guesses of what was deleted. These are HMACs in all but name
(BLAKE2b with a key), made with a key that is drawn for one run and kept elsewhere.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fastlur.content import Content
from fastlur.errors import ArgumentError, RecordError
from fastlur.folder import Folder

KEY = 32  # bytes


@dataclass(frozen=True)
class Fingerprints:
    """The items of one side.

    Attributes:
        items: how many were read.
        left_out: how many were not, of data that may have to be decoded and are many.
        hashes: one a distinct item, keyed, in hexadecimal digits, sorted, so that neither order nor number of copies
            shows.
    """

    items: int
    left_out: int
    hashes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def new_key() -> bytes:
    """Drawn from the system's randomness; the generators of torch, NumPy and Python do not notice."""
    return secrets.token_bytes(KEY)


def fingerprints(content: Content, side: str, key: bytes) -> Fingerprints:
    """Of what was read of a side."""
    return Fingerprints(content.count, content.left_out, keyed(content.hashes, side, key))


def keyed(hashes: Iterable[bytes], side: str, key: bytes) -> list[str]:
    """Keyed hashes of hashes; an item has another one on the other side."""
    person = side.encode()
    return sorted(blake2b(each, digest_size=16, key=key, person=person).hexdigest() for each in hashes)


def check_key(key: object) -> bytes:
    """A key as bytes, or read from the file of that path.

    Raises:
        ArgumentError: it is neither, or of another length.
    """
    if isinstance(key, str | os.PathLike):
        path = Path(key)
        try:
            text = Folder(path.parent, make=False).read(path.name, 4 * KEY).decode("ascii")
            key = bytes.fromhex(text.strip())
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"key={os.fspath(path)!r} cannot be read as {2 * KEY} hexadecimal digits: {error}"
            ) from error
    if not isinstance(key, bytes) or len(key) != KEY:
        kind = f"{len(key)} bytes" if isinstance(key, bytes) else f"a {type(key).__name__}"
        raise ArgumentError(f"key: is {kind}; it must be the {KEY} bytes of `result.key`, or the path of a key file")
    return key


def write_key(path: str | os.PathLike[str], key: bytes, record: str | os.PathLike[str]) -> None:
    """Write a key file that only its owner can read; one that is there already must hold this key.

    Raises:
        ArgumentError: it would lie with the record, or holds another key.
        RecordError: it cannot be written.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ArgumentError(f"key_file={path!r} must be the path of a file")
    place = Path(path)
    try:
        inside = place.parent.resolve().is_relative_to(Path(record).resolve())
    except (OSError, ValueError) as error:
        raise RecordError(f"key_file={os.fspath(place)!r} cannot be written: {error}") from error
    if inside:
        raise ArgumentError(f"key_file={os.fspath(place)!r} lies in the record; whoever has both can test guesses")
    try:
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        if check_key(place) != key:
            raise ArgumentError(f"key_file={os.fspath(place)!r} holds another key; choose another name") from error
        return
    except (OSError, ValueError) as error:
        raise RecordError(f"key_file={os.fspath(place)!r} cannot be written: {error}") from error
    try:
        with open(handle, "w") as file:
            file.write(key.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        place.unlink(missing_ok=True)
        raise RecordError(f"key_file={os.fspath(place)!r} cannot be written: {error}") from error
