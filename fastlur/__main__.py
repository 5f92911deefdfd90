"""The command line: `fastlur demo`, `info`, `verify` and `purge`, also as `python -m fastlur …`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from fastlur.errors import ArgumentError, DataError, FastlurError
from fastlur.info import info
from fastlur.purge import purge
from fastlur.verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for "no" and what failed, 2 for what was asked wrongly."""
    chosen = _parser().parse_args(arguments)
    try:
        match chosen.command:
            case "demo":
                return _demo(chosen.out, chosen.seed, progress=not chosen.quiet)
            case "verify":
                data = {side: _data(getattr(chosen, side), side) for side in ("forget", "retain")}
                found = verify(chosen.directory, **data, key=chosen.key)
                print(found)
                return int(not found.ok)
            case "purge":
                print("\n".join(f"removed {name}" for name in purge(chosen.directory)) or "nothing to remove")
            case _:
                print(json.dumps(info(), indent=1))
    except FastlurError as error:
        print(f"fastlur: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError | DataError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastlur", description="Make a trained model forget some data.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the whole job on scikit-learn's digits: train, unlearn, retrain, compare")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="directory for table, figures and picture")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    commands.add_parser("info", help="versions, device, and which backend serves each operation")
    check = commands.add_parser("verify", help="compare the checksums of a record that result.save wrote")
    check.add_argument("directory")
    for side in ("forget", "retain"):
        text = (
            f"a safetensors file of the {side} items, its tensors named inputs and targets: are they the recorded ones?"
        )
        check.add_argument(f"--{side}", type=Path, help=text)
    check.add_argument("--key", type=Path, help="the file that result.save(key_file=…) wrote")
    remove = commands.add_parser("purge", help="remove checkpoints and what they hold of a model from before")
    remove.add_argument("directory")
    return parser


def _data(path: Path | None, side: str) -> Any:
    if path is None:
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{side}: {str(path)!r} cannot be read as safetensors: {error}") from error


def _demo(out: Path, seed: int, progress: bool) -> int:
    from fastlur.demo import SCENARIOS, play, record, table

    outcomes = [play(name, seed, progress=progress) for name in SCENARIOS]
    text = table(outcomes)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(text + "\n")
    (out / "demo.json").write_text(json.dumps(record(outcomes, seed), indent=1) + "\n")
    try:
        from fastlur.picture import draw

        draw(outcomes, out / "demo.png")
    except ImportError as error:
        print(f"no picture: {error}; pip install 'fastlur[plot]' draws one", file=sys.stderr)
        return 0
    print(f"picture: {out / 'demo.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
