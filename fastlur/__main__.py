"""The command line: `python -m fastlur demo` and `python -m fastlur info`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastlur.info import info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastlur", description="Make a trained model forget some data.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the whole job on scikit-learn's digits: train, unlearn, retrain, compare")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="directory for table, figures and picture")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    commands.add_parser("info", help="versions, device, and which backend serves each operation")
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        print(json.dumps(info(), indent=1))
        return 0
    return _demo(chosen.out, chosen.seed, progress=not chosen.quiet)


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
