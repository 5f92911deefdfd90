"""A directory of files that appear whole or not at all, and that is never left, whatever somebody put into it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

SUFFIX = ".writing"
PIECE = 1 << 20
_LOCKED: weakref.WeakSet[Folder] = weakref.WeakSet()


class Folder:
    """Files of one directory by name; whatever fails is an `OSError`.

    A file is written under another name, flushed to the disk and renamed, so that a crash at any moment leaves the old
    one or the new one. Names have no separator; symbolic links and anything else that is no plain file are neither
    followed nor read, so that nothing outside the directory is touched.

    Args:
        path: where it is.
        make: make it if it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], make: bool = True) -> None:
        if not os.fspath(path):
            raise ValueError("an empty path, which would mean the working directory; write '.' for that")
        self.path = Path(os.path.abspath(path))  # wherever the process goes meanwhile
        if make:
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = None

    def names(self) -> list[str]:
        """Everything in the directory."""
        return sorted(os.listdir(self.path))

    def write(self, name: str, content: bytes) -> None:
        """A whole file, or none and the old one kept."""
        temporary = self._place("." + name + SUFFIX)
        self.remove(temporary.name)
        # made anew: a link that waits under this name is not written through
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(handle, "wb", closefd=True) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._place(name))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._flush()

    def read(self, name: str, most: int) -> bytes:
        """A file of at most `most` bytes."""
        with self._opened(name) as handle:
            size = os.fstat(handle).st_size
            if size > most:
                raise OSError(errno.EFBIG, f"{size} bytes are more than it can hold")
            return b"".join(_pieces(handle))

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[tuple[str, Path]]:
        """A hash of a plain file, however large, and a path of that very file, whatever takes its name meanwhile."""
        digest = blake2b(digest_size=32)
        with self._opened(name) as handle:
            for piece in _pieces(handle):
                digest.update(piece)
            same = Path(f"/dev/fd/{handle}")
            yield digest.hexdigest(), same if same.exists() else self._place(name)

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of a plain file, fewer where it ends before."""
        with self._opened(name) as handle:
            return os.read(handle, count)

    def kind(self, name: str) -> int:
        """What it is, as `stat.S_IFMT` says: a plain file, a link or something else."""
        return stat.S_IFMT(os.lstat(self._place(name)).st_mode)

    def size(self, name: str) -> int:
        """Bytes of a plain file."""
        with self._opened(name) as handle:
            return os.fstat(handle).st_size

    def remove_all(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Remove what can be; the names of it, and why the others cannot."""
        removed, failed = [], []
        for name in names:
            try:
                self.remove(name)
                removed.append(name)
            except OSError as error:
                failed.append(str(error))
        return removed, failed

    def remove(self, name: str) -> None:
        """Remove a file, or a link and not what it points at, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._place(name).unlink()

    def lock(self) -> bool:
        """Keep other processes that ask out, until `unlock` or the end of the process; False if one was first."""
        try:
            import fcntl
        except ImportError:  # not on every platform
            return True
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # some file systems have no locks
        self._lock = handle
        _LOCKED.add(self)
        return True

    def unlock(self) -> None:
        """Let others in, whoever else has inherited the lock."""
        handle, self._lock = self._lock, None
        _LOCKED.discard(self)
        if handle is not None:
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def forget_lock(self) -> None:
        """In a process that was forked: the lock is its parent's, and must end with it."""
        handle, self._lock = self._lock, None
        if handle is not None:
            os.close(handle)

    def _place(self, name: str) -> Path:
        if name in ("", ".", "..") or any(each in name for each in (os.sep, os.altsep or os.sep, "\0")):
            raise OSError(errno.EINVAL, f"{name!r} is no name of a file")
        return self.path / name

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(self._place(name), flags)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, f"{name} is no plain file")
            yield handle
        finally:
            os.close(handle)

    def _flush(self) -> None:
        """The directory itself to the disk, so that the new name stays."""
        if os.name != "posix":
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _forget_locks() -> None:
    for folder in list(_LOCKED):
        folder.forget_lock()
    _LOCKED.clear()


if hasattr(os, "register_at_fork"):  # a loader's workers outlive a killed run by seconds
    os.register_at_fork(after_in_child=_forget_locks)


def _pieces(handle: int) -> Iterator[bytes]:
    while piece := os.read(handle, PIECE):
        yield piece
