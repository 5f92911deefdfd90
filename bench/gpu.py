"""The GPU suite: one command that checks and measures everything on a GPU, and prints a table.

    python -m bench.gpu --out DIR [--data DIR] [--only PART] [--budget SECONDS] [--tiny]

Every part runs in a process of its own, within its share of the time (what one leaves over goes to the next), and
writes DIR/PART.json after every case: a run that is cut off keeps what it has, and a part that crashes takes no other
with it. The exit status is 1 where a part failed or died. Figures are from a GPU only: without one, --tiny runs the
plumbing on a CPU, and the table says so. Where a module is missing without which nothing goes, one line says which, and
the status is 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (ROOT / "tests", HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu_parts.needs import complaint, remark  # noqa: E402

if __name__ == "__main__" and (told := complaint()) is not None:
    print(told, file=sys.stderr)
    sys.exit(2)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from gpu_parts import PARTS  # noqa: E402
from gpu_parts.book import Book, Options, save  # noqa: E402
from gpu_parts.mnist import located  # noqa: E402
from gpu_parts.processes import process  # noqa: E402
from gpu_parts.table import table  # noqa: E402

BUDGET = 480.0
GRACE = 20.0  # seconds beyond its share after which a part is ended from outside
Launch = Callable[[str, float], str | None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=Path, help="folder with the four MNIST files, or with MNIST/raw")
    parser.add_argument("--only", choices=PARTS, help="run one part, in this process")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, which also run on a CPU")
    given = parser.parse_args(arguments)
    if not (given.tiny or torch.cuda.is_available()):
        print("There is no CUDA device here. --tiny runs the plumbing on a CPU.", file=sys.stderr)
        return 2
    if given.data:
        try:
            located(given.data)
        except FileNotFoundError as error:  # before minutes have gone by
            print(f"--data: {error}", file=sys.stderr)
            return 2
    if given.only:
        with stoppable():
            ran = alone(given.only, given.out, given.budget, Options(given.tiny, given.data))
        if __name__ == "__main__" and "FASTLUR_SUITE" not in os.environ:
            print(table(given.out, [given.only]))
        return 0 if ran else 1

    if (without := remark()) is not None:
        print(without, flush=True)

    def launch(part: str, seconds: float) -> str | None:
        more = ["--data", str(given.data.resolve())] if given.data else []
        command = [sys.executable, "-m", "bench.gpu", "--only", part, "--out", str(given.out.resolve()), *more]
        return process([*command, "--budget", f"{seconds:.1f}", *(["--tiny"] if given.tiny else [])], seconds + GRACE)

    with stoppable():
        return suite(given.out, given.budget, launch)


def suite(out: Path, budget: float, launch: Launch, now: Callable[[], float] = time.monotonic) -> int:
    """All parts in turn, whatever becomes of each; then the table.

    Args:
        out: folder for the results.
        budget: seconds for everything.
        launch: runs a part with so many seconds; returns None, or what went wrong.
        now: the clock.
    """
    end = now() + budget
    bad = False
    parts = list(PARTS)
    for part in parts:
        (out / f"{part}.json").unlink(missing_ok=True)  # an earlier run's figures are not this one's
    try:
        for index, part in enumerate(parts):
            weight = sum(PARTS[each][0] for each in parts[index:])
            share = max(0.0, end - now()) * PARTS[part][0] / weight
            print(f"{part}: {PARTS[part][1]} ({share:.0f} s)", flush=True)
            try:
                fault = launch(part, share)
            except BaseException:
                note(out / f"{part}.json", part, "the suite was stopped")
                raise
            if fault is not None:
                bad = True
                note(out / f"{part}.json", part, fault)
    finally:  # what there is, also where somebody stops it
        text = table(out, parts)
        save(out / "table.md", text + "\n")
        print(f"\n{text}", flush=True)
    return int(bad)


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM ends the suite as Ctrl-C does, by an exception: what it started ends, and it says what it has."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def alone(part: str, out: Path, seconds: float, options: Options) -> bool:
    """One part in this process; whether nothing in it failed."""
    book = Book(out / f"{part}.json", part, seconds, options.tiny)
    importlib.import_module(f"gpu_parts.{part}").run(book, options)
    return book.finish()


def note(path: Path, part: str, fault: str) -> None:
    """Write into a part's results that something went wrong; what it had written before stays.

    Args:
        path: the part's file.
        part: its name.
        fault: what went wrong; below the first line, the last ones of what the part wrote to stderr.
    """
    what, *told = fault.splitlines()
    kept: dict[str, Any] = {"part": part, "machine": None, "complete": False, "cases": []}
    if path.exists():
        kept = json.loads(path.read_text())
    save(path, json.dumps(kept | {"fault": what} | ({"stderr": told} if told else {}), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
