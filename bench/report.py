"""Put the figures of committed results into the README, between its markers. `--check` only says whether they match."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts import PARTS
from gpu_parts.table import table
from tables import scissorhands, steps

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


def operations() -> str:
    """The vector operations against torch, from every `*-ops.json` in bench/results."""
    lines = []
    for path in sorted((ROOT / "bench" / "results").glob("*-ops.json")):
        kept = json.loads(path.read_text())
        made, rows = kept["machine"], kept["rows"]
        where = made["gpu"] or f"{made['cpu']}, {made['threads']} threads"
        layouts = list(dict.fromkeys(row["layout"] for row in rows))
        lines += [
            f"{where}, torch {made['torch']}, served by `{rows[0]['backend']}`, float32. Times as fast as the best "
            "torch spelling (which one that was) / as `_foreach`:",
            "",
            f"| | {' | '.join(layouts)} |",
            f"|---{'|---' * len(layouts)}|",
        ]
        for name in dict.fromkeys(row["operation"] for row in rows):
            mine = [row for row in rows if row["operation"] == name]
            ratios = [(row["times_as_fast_as_best_torch"], row["times_as_fast_as_foreach"]) for row in mine]
            cells = [
                f"{best:.2f} ({row['best_torch']}) / {foreach:.2f}"
                for row, (best, foreach) in zip(mine, ratios, strict=True)
            ]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
        large = [row["seconds"] for row in rows if row["layout"] != "1e5 flat" and "plain" in row["seconds"]]
        slower = [seconds["plain"] / seconds["ours"] for seconds in large]
        if slower:
            span = f"{min(slower):.1f} to {max(slower):.1f}"
            lines += ["", f"From 1e6 elements on the plain backend took {span} times as long as this one."]
        lines.append("")
    return "\n".join(lines).rstrip()


def gpu() -> str:
    """The GPU suite's table, from every folder of results in bench/results that has a GPU's name in it."""
    tables = []
    for folder in sorted((ROOT / "bench" / "results").glob("gpu-*")):
        kept = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        if kept and all(part["machine"] and part["machine"]["gpu"] and not part["tiny"] for part in kept):
            tables.append(table(folder, PARTS).replace("## ", "#### ").replace("# ", "### ", 1))
    return "\n\n".join(tables) or "Not measured on a GPU."


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "operations": operations,
    "steps": steps,
    "scissorhands": scissorhands,
    "gpu": gpu,
}


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
