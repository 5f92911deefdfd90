"""A book of results with a clock: every case is written down at once, and what no longer fits is said to be skipped."""

from __future__ import annotations

import datetime
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine

Row = dict[str, Any]
Case = Callable[[Row], None]


@dataclass(frozen=True)
class Options:
    """What the parts are told: sizes for a CPU in seconds, and where MNIST lies, if anywhere."""

    tiny: bool = False
    data: Path | None = None


class Book:
    """What one part found; the file is whole after every case, whenever the run is cut off.

    Args:
        path: the JSON file.
        part: its name.
        seconds: how long the part may take, from now on.
        tiny: whether sizes are those of the plumbing's test.
        now: the clock.
    """

    def __init__(
        self, path: Path, part: str, seconds: float, tiny: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.part, self.seconds, self.tiny, self.now = path, part, seconds, tiny, now
        self.began = now()
        self.machine = machine()
        self.date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        self.cases: list[Row] = []
        self.complete = False
        self.write()

    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (self.now() - self.began)

    def case(self, name: str, expected: float, run: Case) -> Row:
        """Run a case and write it down; one that raises is written down as failed, with what it had found until then.

        Args:
            name: what it is called.
            expected: seconds it is likely to take; with less than that left it is skipped, and the book says so.
            run: given the row to fill in.
        """
        row: Row = {"case": name, "status": "done"}
        self.cases.append(row)
        began, left = self.now(), self.left()
        if left < expected:
            row["status"] = "skipped"
            row["why"] = f"{max(left, 0):.0f} s were left of {self.seconds:.0f}, {expected:.0f} are likely"
        else:
            try:
                run(row)
            except Skip as skip:
                row |= {"status": "skipped", "why": str(skip)}
            except torch.OutOfMemoryError as error:
                row |= {"status": "out of memory", "why": str(error).splitlines()[0]}
            except Exception as error:
                told = traceback.format_exc().splitlines()[-12:]
                row |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:2000], "trace": told}
            row["spent_seconds"] = round(self.now() - began, 2)
            release()
        self.write()
        print(f"  {name}: {row['status']}{' (' + row['why'][:150] + ')' if 'why' in row else ''}", flush=True)
        return row

    def finish(self) -> bool:
        """Say that nothing was cut off; whether no case failed."""
        self.complete = True
        self.write()
        return all(row["status"] != "failed" for row in self.cases)

    def write(self) -> None:
        """The file appears whole."""
        kept = {
            "part": self.part,
            "machine": self.machine,
            "date": self.date,
            "tiny": self.tiny,
            "budget_seconds": round(self.seconds, 1),
            "spent_seconds": round(self.now() - self.began, 1),
            "complete": self.complete,
        }
        head = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items())
        rows = ",\n  ".join(json.dumps(row) for row in self.cases)
        save(self.path, f'{{\n {head},\n "cases": [\n  {rows}\n ]\n}}\n')


class Skip(Exception):
    """Raised by a case that cannot be had here, with the reason."""


def save(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    os.replace(temporary, path)


def release() -> None:
    """Give memory back between cases, so that one that was out of it does not take the next ones with it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device() -> torch.device:
    """Where the suite runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
