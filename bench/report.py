"""Put the figures of committed results into the README, between its markers. `--check` only says whether they match."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def demo() -> str:
    """The table of the demo, from `docs/demo.json`."""
    record: dict[str, Any] = json.loads((ROOT / "docs" / "demo.json").read_text())
    lines = ["| | | UA | RA | TA | MIA | gap | seconds |", "|---|---|---|---|---|---|---|---|"]
    for name, run in record["scenarios"].items():
        times = {"before": "", "after": f"{run['seconds']:.1f}", "retrained": f"{run['retraining_seconds']:.1f}"}
        for place, spent in times.items():
            cells = [f"{run[place][key] or 0:.1f}" for key in ("ua", "ra", "ta", "mia", "gap")]
            lines.append(f"| {name if place == 'before' else ''} | {place} | {' | '.join(cells)} | {spent} |")
    made = record["made_on"]
    lines.append(f"\nseed {record['seed']}, torch {made['torch']}, {made['device']}")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {"demo": demo}


def filled(text: str) -> str:
    """The README with every section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name}: made by bench/report.py -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md has {count} sections named {name}, not one")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    before = README.read_text()
    after = filled(before)
    if parser.parse_args().check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
