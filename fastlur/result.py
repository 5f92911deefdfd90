"""What a run gives back."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from fastlur.history import History


@dataclass
class Result:
    """The outcome of `unlearn`.

    Attributes:
        model: the model that was passed, changed in place, with ordinary parameters again.
        history: columns of numbers, one entry a step (see `fastlur.history.History`).
        seconds: wall time of the unlearning itself, checks and data included.
        peak_memory: bytes; on CUDA the peak allocated during the run, on the CPU the peak resident size of the process.
        ended: why the run ended.
        settings: everything that determines the run, as plain values.
    """

    model: nn.Module
    history: History
    seconds: float
    peak_memory: int
    ended: str
    settings: dict[str, Any] = field(default_factory=dict)

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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `model.safetensors` and `result.json` into the directory `path`, each whole or not at all.

        Returns:
            The directory. Load the weights with `safetensors.torch.load_model(model, path / "model.safetensors")`.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        record = {
            "settings": self.settings,
            "ended": self.ended,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "history": dict(self.history),
            "statement": "Approximate unlearning by optimisation: no certificate of deletion; see the metrics.",
        }
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as scratch:
            weights, text = Path(scratch, "model.safetensors"), Path(scratch, "result.json")
            safetensors.torch.save_model(self.model, str(weights))
            text.write_text(json.dumps(record, indent=1))
            for file in (weights, text):
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                file.replace(directory / file.name)
        return directory
