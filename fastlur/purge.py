"""Removing what still holds a model from before."""

from __future__ import annotations

import os

from fastlur.errors import CheckpointError
from fastlur.folder import Folder
from fastlur.ours import checkpoint_files
from fastlur.record import orphans


def purge(directory: str | os.PathLike[str]) -> list[str]:
    """Remove checkpoints, with the frozen copies and anchors in them, and what broken-off writes have left.

    A record in the same directory stays, and so does every file of another name, or without the mark that ours
    begin with. A link is removed, not what it points at. Files are removed as the system removes files: what a
    disk, a snapshot or a backup keeps of them is not reached.

    Returns:
        The names of the files removed.

    Raises:
        CheckpointError: there is no such directory, a run is using it, or something could not be removed; the rest
            was.
    """
    try:
        folder = Folder(directory, make=False)
        free = folder.lock()
        if not free:
            raise CheckpointError(f"{os.fspath(directory)!r} is in use by a run; wait for its end")
        try:
            (found, unread), (left, unread_too) = checkpoint_files(folder), orphans(folder)
            removed, failed = folder.remove_all(sorted({*found, *left}))
        finally:
            folder.unlock()
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory!r} cannot be purged: {error}") from error
    if failed := failed + unread + unread_too:
        done = f" ({len(removed)} files were removed)" if removed else ""
        raise CheckpointError(f"{directory!r} cannot be purged of {len(failed)} files: {failed[0]}{done}")
    return removed
