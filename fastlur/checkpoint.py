"""Checkpoints: the whole state of a run in two files, written whole or not at all, and read back with a checksum.

`fastlur-step-N.safetensors` holds the tensors, `fastlur-step-N.json` everything else and the checksum of the former;
the second is written last, so that a checkpoint exists when its JSON does. The last two are kept. Nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open

from fastlur import ours
from fastlur.errors import CheckpointError, first_line
from fastlur.folder import Folder
from fastlur.identity import SETTINGS
from fastlur.passes import Loss, Passes
from fastlur.step import Step
from fastlur.target_state import brought_back
from fastlur.whole_state import gathered, put_back

KEPT = 2
LARGEST = 16 << 20  # bytes of a description without a history: names, settings, states of rules, random states
ROW = 512  # bytes of the history of a step, more than its numbers take
VERSIONS = ("fastlur", "torch")  # a difference to be named first, since it explains others
# what a file that is damaged, or was made to do damage, may bring out of the libraries that read it
DAMAGE = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    StopIteration,
    RuntimeError,
    RecursionError,
    MemoryError,
    OverflowError,
)


class Found(NamedTuple):
    """An intact checkpoint of this run: its description, and the file of its tensors."""

    record: dict[str, Any]
    tensors: str


class Checkpoints:
    """The checkpoints of one run in one directory, which nobody else may write to until `close`.

    Args:
        directory: made if it does not exist.
        settings: what determines the run; a checkpoint of other settings is refused.

    Raises:
        CheckpointError: the directory cannot be made or written to, or another run is using it.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self._damaged: list[int] = []
        self.name, self.settings = repr(os.fspath(directory)), settings
        try:
            self.folder = Folder(directory)
            free = self.folder.lock()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint={self.name} cannot be written to: {error}") from error
        if not free:
            raise CheckpointError(f"checkpoint={self.name} is in use by another run; wait for it, or use another")
        try:
            probe = ours.probe()
            self.folder.write(probe, b"")
            self.folder.remove(probe)
        except OSError as error:
            self.close()
            raise CheckpointError(f"checkpoint={self.name} cannot be written to: {error}") from error

    def close(self) -> None:
        """Let others use the directory."""
        self.folder.unlock()

    def save(self, step: Step, extra: dict[str, Any]) -> None:
        """Write the state after the step just done, random states of the host and of every device included.

        Args:
            step: the step.
            extra: what else belongs to the run, as plain JSON.

        Raises:
            CheckpointError: it could not be written; older checkpoints are as they were.
        """
        stem = ours.stem(step.step)
        self._spare_strangers(stem)
        try:
            payload, text = self._content(step, extra)
            self.folder.write(f"{stem}.safetensors", payload)
            self.folder.write(f"{stem}.json", text)
        except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError, MemoryError) as error:
            for name in (f"{stem}.json", f"{stem}.safetensors"):
                with suppress(OSError):
                    self.folder.remove(name)
            raise CheckpointError(
                f"checkpoint={self.name}: {stem} could not be written: {str(error) or type(error).__name__}"
            ) from error
        with suppress(OSError):  # one too many does no harm
            for old in self._steps(ours.checkpoint_files(self.folder)[0])[KEPT:]:
                self._remove(ours.stem(old))

    def newest(self) -> Found | None:
        """The newest intact checkpoint; what a crash has left of others is removed.

        Raises:
            CheckpointError: there are checkpoints, but of another run, or not one is intact.
        """
        faults, self._damaged = [], []
        try:
            for number in self._steps(self.folder.names()):
                try:
                    found = self._read(number)
                    theirs = dict(found.record["settings"])
                except DAMAGE as error:
                    faults.append(f"step {number}: {first_line(error)}")
                    self._damaged.append(number)
                    continue
                self._same_run(theirs)
                self._tidy()
                return found
        except OSError as error:
            raise CheckpointError(f"checkpoint={self.name} cannot be read: {error}") from error
        if faults:
            raise CheckpointError(f"checkpoint: none in {self.name} is intact ({'; '.join(faults)}); move them away")
        return None

    def target(self, found: Found) -> Callable[[Passes], Loss] | None:
        """What brings the target of a run's forget loss back as it was, where it had one that was made; else None.

        Raises:
            CheckpointError: now, or when it is called: what the checkpoint holds does not fit the run.
        """
        if found.record.get("forget_target") is None:
            return None
        prefix = "target/"
        with self._reading(found) as file:
            tensors = {n.removeprefix(prefix): file.get_tensor(n) for n in set(file.keys()) if n.startswith(prefix)}

        def again(passes: Passes) -> Loss:
            with self._fitting(found):
                return brought_back(found.record["forget_target"], tensors, passes)

        return again

    def restore(self, step: Step, found: Found) -> None:
        """Bring a run to where it was; on an error the model is as it was.

        Raises:
            CheckpointError: what the checkpoint holds does not fit the run.
        """
        with self._reading(found) as file:
            put_back(step, found.record, file.get_tensor, set(file.keys()))
        mine, _ = ours.checkpoint_files(self.folder)
        for name in (f"{ours.stem(number)}.{ending}" for number in self._damaged for ending in ours.PAIR):
            if name in mine:  # or it would count as one of those that are kept
                with suppress(OSError):
                    self.folder.remove(name)

    def purge(self) -> bool:
        """Remove every checkpoint, since they still hold the old weights; what cannot be removed is warned of.

        Returns:
            Whether nothing is left.
        """
        failed: list[str] = []
        try:
            found, unread = ours.checkpoint_files(self.folder)
            failed = self.folder.remove_all(found)[1] + unread
        except OSError as error:
            failed = [str(error)]
        if failed:
            warnings.warn(
                f"checkpoint={self.name} holds weights from before, and they could not be removed: {failed[0]}",
                stacklevel=2,
            )
        return not failed

    def _content(self, step: Step, extra: dict[str, Any]) -> tuple[bytes, bytes]:
        """Both files."""
        record, tensors = gathered(step)
        payload = safetensors.torch.save(tensors, metadata=ours.metadata(ours.CHECKPOINT))
        record |= {"settings": self.settings, "checksum": blake2b(payload, digest_size=32).hexdigest(), **extra}
        text = json.dumps(record)
        whole = ours.described(ours.CHECKPOINT, json.dumps({"record": record, "checksum": _digest(text)}))
        if len(whole) > _most(record["step"]):
            raise ValueError(f"its description has {len(whole)} bytes, and could not be read again")
        return payload, whole

    def _read(self, number: int) -> Found:
        stem = ours.stem(number)
        outer = json.loads(self.folder.read(f"{stem}.json", _most(number)))
        record: dict[str, Any] = outer["record"]
        if outer["fastlur"] != ours.CHECKPOINT or _digest(json.dumps(record)) != outer["checksum"]:
            raise ValueError("its description is damaged")
        if record["step"] != number:
            raise ValueError(f"it was made after step {record['step']}")
        with self.folder.opened(f"{stem}.safetensors") as (digest, _):
            if digest != record["checksum"]:
                raise ValueError("its tensors are damaged")
        return Found(record, f"{stem}.safetensors")

    @contextmanager
    def _fitting(self, found: Found) -> Iterator[None]:
        """Whatever fails inside is a `CheckpointError`."""
        try:
            yield
        except CheckpointError:
            raise
        except DAMAGE as error:
            raise CheckpointError(
                f"checkpoint={self.name}: step {found.record.get('step')} does not fit this run: {first_line(error)}"
            ) from error

    @contextmanager
    def _reading(self, found: Found) -> Iterator[Any]:
        """The tensors of a checkpoint, unchanged since it was found."""
        with self._fitting(found), self.folder.opened(found.tensors) as (digest, path):
            if digest != found.record["checksum"]:
                raise ValueError("its tensors have changed since they were found")
            with safe_open(path, framework="pt") as file:
                yield file

    def _same_run(self, theirs: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(self.settings))
        for key in sorted({*mine, *theirs}, key=lambda key: (key not in VERSIONS, key)):
            if mine.get(key) != theirs.get(key) and not _noted(key, theirs.get(key), mine.get(key)):
                was, now = _differing(key, theirs.get(key), mine.get(key))
                raise CheckpointError(
                    f"checkpoint={self.name} is of another run: {key} was {was!r}, now {now!r}; "
                    f"{'pass the model as it was at the start, or ' if key == 'model' else ''}"
                    "use another directory, or remove it to start afresh"
                )

    def _steps(self, names: list[str]) -> list[int]:
        """The steps of the descriptions among these files, the last one first."""
        found = map(ours.NAME.fullmatch, names)
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _tidy(self) -> None:
        """Remove what a crash has left: half-written files, tensors without a description."""
        found, _ = ours.checkpoint_files(self.folder)
        described = {ours.stem(number) for number in self._steps(found)}
        for name in found:
            if Path(name).stem not in described:
                with suppress(OSError):
                    self.folder.remove(name)

    def _remove(self, stem: str) -> None:
        for suffix in ours.PAIR:
            self.folder.remove(f"{stem}.{suffix}")

    def _spare_strangers(self, stem: str) -> None:
        """Refuse to write over what somebody else wrote."""
        with suppress(OSError):  # what cannot be read cannot be written either, and that is said then
            names = set(self.folder.names())
            for name in (f"{stem}.{suffix}" for suffix in ours.PAIR):
                if name in names and not ours.is_checkpoint(self.folder, name):
                    raise CheckpointError(
                        f"checkpoint={self.name}: {name} is there, and fastlur did not write it; move it away"
                    )


def _most(step: int) -> int:
    """Bytes that the description of a checkpoint after a step may have."""
    return min(LARGEST + ROW * step, 1 << 30)


def _noted(key: str, one: Any, other: Any) -> bool:
    """Whether two runs differ only in what a module of one of them has noted on its way."""
    if key != SETTINGS or not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def _differing(key: str, one: Any, other: Any) -> tuple[Any, Any]:
    """Of two sets of settings what they do not have in common; of a model's, what it is that `_noted` minds."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    if key == SETTINGS:
        names = [name for name in names if name in one and name in other]
    return tuple({name: each[name] for name in names if name in each} for each in (one, other))  # type: ignore[return-value]


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()
