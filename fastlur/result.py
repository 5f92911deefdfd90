"""What a run gives back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastlur import record
from fastlur.errors import ArgumentError, RecordError
from fastlur.fingerprints import Fingerprints, new_key, write_key
from fastlur.history import History
from fastlur.identity import state_digest
from fastlur.info import versions
from fastlur.statement import statement


@dataclass
class Result:
    """The outcome of `unlearn`.

    Attributes:
        model: the model that was passed, changed in place, with ordinary parameters again.
        history: columns of numbers, one entry a step (see `fastlur.history.History`).
        seconds: wall time of the unlearning itself, checks and data included; of a run that was interrupted, up to its
            checkpoints and since.
        peak_memory: bytes; on CUDA the peak allocated during the run, on the CPU the peak resident size of the process.
        ended: why the run ended.
        settings: everything that determines the run, as plain values.
        data: keyed hashes of the forget and the retain items.
        key: what they are keyed with, 32 bytes, drawn for this run. With it guesses of what was forgotten can be
            tested: keep it apart from the record, or let it go.
        caveat: what the method does not guarantee.
        digest: a hash of the model's state_dict at the end of the run; None: not known.
    """

    model: nn.Module
    history: History
    seconds: float
    peak_memory: int
    ended: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Fingerprints] = field(default_factory=dict, repr=False)
    key: bytes = field(default_factory=new_key, repr=False)
    caveat: str = ""
    digest: str | None = field(default=None, repr=False)

    def summary(self) -> str:
        """A few lines for a person."""
        steps = len(self.history["step"])
        lines = [
            f"fastlur {self.settings.get('method', {}).get('name', '')}: {steps} steps in {self.seconds:.1f} s, "
            f"peak memory {self.peak_memory / 2**20:.0f} MiB ({self.ended})"
        ]
        if steps:
            for name in ("forget_loss", "retain_loss", "cosine"):
                column = self.history[name]
                lines.append(f"  {name:12s} {column[0]:8.4f} at the first step, {column[-1]:8.4f} at the last")
        return "\n".join(lines)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        before: Any = None,
        after: Any = None,
        reference: Any = None,
        key_file: str | os.PathLike[str] | None = None,
    ) -> Path:
        """Write the record of what was done into the directory `path`, whole or not at all.

        `result.json` says it in words and figures and names the file of the weights; a record that is there already is
        replaced in one moment. `fastlur verify DIR` compares the checksums, `fastlur.verify` does with data as well,
        and `fastlur.record.read(path).load(model)` brings the weights back.

        Args:
            path: the directory; made if it does not exist.
            before: metrics of the model as given: an `Evaluation`, or a dict of plain values.
            after: metrics of the model as it is now, likewise.
            reference: metrics of a retrained model, likewise.
            key_file: write `key` into this file, which only you can read and which must lie elsewhere. None: it is
                written nowhere, and when `result.key` is gone, nobody can ask the record about an item any more.

        Returns:
            The directory.

        Raises:
            ArgumentError: metrics that are no plain values, or a key file that lies in the record.
            RecordError: the record cannot be written, or the model is no longer that of the end of the run; what was
                there is as it was.
        """
        given = {"before": before, "after": after, "reference": reference}
        metrics = {name: _plain(name, value) for name, value in given.items() if value is not None}
        content = {
            "statement": statement(self.caveat, self.settings, self.data, metrics),
            "settings": self.settings,
            "versions": versions(),
            "data": {side: items.as_dict() for side, items in self.data.items()},
            "metrics": metrics,
            "ended": self.ended,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "history": dict(self.history),
        }
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ArgumentError(f"path={path!r} must be the path of a directory")
        now = None if self.digest is None else state_digest(self.model)
        if self.digest is not None and now is None:
            raise RecordError("model: its state cannot be read, as it could at the end of the run")
        if now != self.digest:
            raise RecordError(
                "model: has changed since the run, so that this record would not be of its weights; save right after "
                "the run, before anything else is done to the model"
            )
        if key_file is not None:
            write_key(key_file, self.key, path)
        return record.write(path, self.model, content)


def _plain(name: str, value: Any) -> dict[str, Any]:
    """Metrics as JSON knows them."""
    plain = value.as_dict() if hasattr(value, "as_dict") else value
    if not isinstance(plain, Mapping) or not record.is_plain(plain):
        raise ArgumentError(f"{name}: a {type(value).__name__} is neither an Evaluation nor a dict of plain values")
    return dict(plain)
