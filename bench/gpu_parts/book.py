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

from fastlur import ModelError

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
        self.lost: str | None = None  # why the device can do nothing more in this process
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
        if self.lost is not None:
            row |= {"status": "skipped", "why": f"the device was lost before: {self.lost}"}
        elif left < expected:
            row["status"] = "skipped"
            row["why"] = f"{max(left, 0):.0f} s were left of {self.seconds:.0f}, {expected:.0f} are likely"
        else:
            try:
                run(row)
            except Skip as skip:
                row |= {"status": "skipped", "why": str(skip)}
            except torch.OutOfMemoryError as error:
                row |= {"status": "out of memory", "why": first_line(error)}
            except Exception as error:
                told = traceback.format_exc().splitlines()[-12:]
                row |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:2000], "trace": told}
            row["spent_seconds"] = round(self.now() - began, 2)
            self.write()  # before the device is asked for anything: after some errors it raises whatever it is asked
            self.settle(row)
        self.write()
        print(f"  {name}: {row['status']}{' (' + row['why'][:150] + ')' if 'why' in row else ''}", flush=True)
        return row

    def settle(self, row: Row) -> None:
        """Wait for the device and give memory back; where that raises, this process has lost the device."""
        try:
            release()
        except Exception as error:
            self.lost = first_line(error)
            if row["status"] == "done":  # what it left on the device has failed since
                row |= {"status": "failed", "why": self.lost}

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


def first_line(error: BaseException) -> str:
    """What kind of error, and the first line of what it says, if anything."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}"[:300] if said else type(error).__name__


def drop(row: Row, arm: str, error: Exception, ours: bool) -> None:
    """Write down that an arm cannot run, and why.

    Too little memory, and a model that this package refuses by name, are answers. Anything else is a fault where the
    arm is our own: `settled` makes the case fail.
    """
    row.setdefault("dropped", {})[arm] = first_line(error)
    if ours and not isinstance(error, torch.OutOfMemoryError | ModelError):
        row.setdefault("faults", []).append(arm)


def settled(row: Row) -> None:
    """Raise where an arm of our own did not run, or was refused by the gate, once all there is has been written down.

    Raises:
        AssertionError: naming the arms.
    """
    bad = {arm: row["dropped"][arm] for arm in row.get("faults", [])}
    bad |= dict.fromkeys(row.get("refused", {}), "does not align with float64")
    assert not bad, f"of our own: {'; '.join(f'{arm}: {why}' for arm, why in bad.items())}"


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
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def device() -> torch.device:
    """Where the suite runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
