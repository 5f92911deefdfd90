"""Which files of a directory this package wrote: by their names, and by a mark in them. Nothing else is ever removed.

A mark stands at the beginning of both files of a checkpoint and of the weights of a record. One file of a pair speaks
for the other, whose mark may be what was damaged.
"""

from __future__ import annotations

import re
import secrets
import stat
from collections.abc import Callable, Iterable

from fastlur.folder import SUFFIX, Folder

STEM = "fastlur-step-"
CHECKPOINT, RECORD = "checkpoint", "record"
PAIR = ("json", "safetensors")
NAME = re.compile(rf"{STEM}([0-9]{{8}})\.json")
_FILE = re.compile(rf"({STEM}[0-9]{{8}})\.(json|safetensors)")
_PROBE = re.compile(r"fastlur-probe-[0-9a-f]{16}")
_HALF = re.compile(rf"\.({STEM}[0-9]{{8}}\.(json|safetensors)|{_PROBE.pattern})" + re.escape(SUFFIX))


def stem(number: int) -> str:
    """The name of the checkpoint after a step, without what its two files end in."""
    return f"{STEM}{number:08d}"


def probe() -> str:
    """The name of an empty file that shows whether a directory can be written to: nobody has one of that name."""
    return f"fastlur-probe-{secrets.token_hex(8)}"


def metadata(kind: str) -> dict[str, str]:
    """The mark of a file of tensors, for its header."""
    return {"fastlur": kind}


def described(kind: str, text: str) -> bytes:
    """A JSON object with the mark in front."""
    return _mark("json", kind) + text.lstrip("{").encode()


def checkpoint_files(folder: Folder) -> tuple[list[str], list[str]]:
    """What checkpoints have left there, whole or half (see `is_checkpoint`), and what is wrong with the rest."""
    return told_apart(folder.names(), lambda name: is_checkpoint(folder, name))


def told_apart(names: Iterable[str], is_ours: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Which of these are ours, and of those that cannot be looked at why: nobody knows whose those files are."""
    found, unread = [], []
    for name in names:
        try:
            found += [name] if is_ours(name) else []
        except OSError as error:
            unread.append(str(error))
    return found, unread


def is_checkpoint(folder: Folder, name: str) -> bool:
    """Whether a file is of a checkpoint; an empty one and a link by its name alone, since nothing is lost with it."""
    if _HALF.fullmatch(name):
        return is_marked(folder, name, CHECKPOINT)
    if _PROBE.fullmatch(name):
        return folder.kind(name) == stat.S_IFREG and not folder.head(name, 1)
    found = _FILE.fullmatch(name)
    if not found:
        return False
    pair = {f"{found[1]}.{ending}" for ending in PAIR} & set(folder.names())
    return is_marked(folder, name, CHECKPOINT) or any(
        folder.kind(each) == stat.S_IFREG and folder.head(each, 1) and is_marked(folder, each, CHECKPOINT)
        for each in pair - {name}
    )


def is_marked(folder: Folder, name: str, kind: str) -> bool:
    """Whether a file begins with the mark, as far as it goes: it may have been cut off."""
    if folder.kind(name) != stat.S_IFREG:
        return True
    ending = name.removesuffix(SUFFIX).rpartition(".")[2]
    skipped = 8 if ending == "safetensors" else 0  # the length of the header
    mark = _mark(ending, kind)
    return mark.startswith(folder.head(name, skipped + len(mark))[skipped:])


def _mark(ending: str, kind: str) -> bytes:
    if ending == "safetensors":
        return f'{{"__metadata__":{{"fastlur":"{kind}"'.encode()
    return f'{{"fastlur": "{kind}", '.encode()
