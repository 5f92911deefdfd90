"""Put the figures of committed results into the README and docs/, between markers. `--check` only compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from asked import cheaper, exact, growth, large, targets
from audit_tables import audit, deterministic
from gpu_parts import PARTS
from gpu_parts.table import table as gpu_table
from llm import report as language
from picture import draw
from quality import report as quality
from tables import memory, scissorhands, steps, whole
from traffic import FOREACH_TRAFFIC, TRAFFIC

from fastlur.backends import CHECKED

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
        spread = ", [the middle half of the rounds]" if "quartiles_of_that" in rows[0] else ""
        lines += [
            f"{where}, torch {made['torch']}, served by `{rows[0]['backend']}`, float32. Times as fast as the best "
            f"torch spelling{spread} (which one that was) / as `_foreach`:",
            "",
            *table(rows, speed),
            "",
            "Gigabytes a second, every operand counted once, and in percent of what a copy of that size reached:",
            "",
            *table(rows, bandwidth),
            "",
        ]
        large = [row for row in rows if row["layout"] not in ("1e5 flat", "scalars")]
        behind = [
            f"`{row['operation']}` {row['times_as_fast_as_best_torch']:.2f} at {row['layout']} ({row['best_torch']})"
            for row in large
            if row["times_as_fast_as_best_torch"] < 1
        ]
        if behind:
            lines += [f"From 1e6 elements on slower than the best torch spelling: {', '.join(behind)}.", ""]
        few = [
            f"`{row['operation']}` {row['times_as_fast_as_foreach']:.2f} at {row['layout']} "
            f"(by bytes at most {FOREACH_TRAFFIC[row['operation']] / TRAFFIC[row['operation']]:.2g})"
            for row in large
            if row["operation"] in FOREACH_TRAFFIC
            and row["times_as_fast_as_foreach"] < 2
            and FOREACH_TRAFFIC[row["operation"]] > TRAFFIC[row["operation"]]
        ]
        if few:
            lines += [f"Less than twice as fast as `_foreach`, although passes are fused: {', '.join(few)}.", ""]
        for row in (each for each in rows if each["layout"] == "scalars"):
            times = row["times_as_fast_as_best_torch"]
            lines += [f"`{row['operation']}`, on scalars only: {times:.2f} times as fast as {row['best_torch']}.", ""]
        large = [row["seconds"] for row in large if "plain" in row["seconds"]]
        slower = [seconds["plain"] / seconds["ours"] for seconds in large]
        if slower:
            span = f"{min(slower):.1f} to {max(slower):.1f}"
            lines += [f"From 1e6 elements on the plain backend took {span} times as long as this one.", ""]
    return "\n".join(lines).rstrip()


def table(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """One line an operation, one column a layout."""
    rows = [row for row in rows if row["layout"] != "scalars"]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    lines = [f"| | {' | '.join(layouts)} |", f"|---{'|---' * len(layouts)}|"]
    for name in dict.fromkeys(row["operation"] for row in rows):
        cells = {row["layout"]: cell(row) for row in rows if row["operation"] == name}
        lines.append(f"| `{name}` | {' | '.join(cells.get(layout, '') for layout in layouts)} |")
    return lines


def speed(row: dict[str, Any]) -> str:
    """How many times as fast as torch; the spread, where it was recorded."""
    spread = " [{:.2f}–{:.2f}]".format(*row["quartiles_of_that"]) if "quartiles_of_that" in row else ""
    best, foreach = row["times_as_fast_as_best_torch"], row["times_as_fast_as_foreach"]
    return f"{best:.2f}{spread} ({row['best_torch']})" + ("" if foreach is None else f" / {foreach:.2f}")


def bandwidth(row: dict[str, Any]) -> str:
    """Bytes a second, and what part that is of a copy's."""
    reached, of = row["gigabytes_per_second"], row["copy_gigabytes_per_second"]
    return f"{reached:.1f} ({100 * reached / of:.0f} %)"


def gpu() -> str:
    """The GPU suite's table, from every folder gpu-* in bench/results that was measured on a GPU."""
    tables = []
    for folder in sorted((ROOT / "bench" / "results").glob("gpu-*")):
        kept = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        ran = [part for part in kept if part["machine"]]  # one that died at once says nothing, and the table says so
        if ran and all(part["machine"]["gpu"] and not part["tiny"] for part in ran):
            tables.append(gpu_table(folder, PARTS).replace("## ", "#### ").replace("# ", "### ", 1))
    return "\n\n".join(tables) or "Not measured on a GPU."


def checked() -> str:
    """What the code of each backend has been through, as `fastlur.info()` says it."""
    places = dict.fromkeys(where for _, where in CHECKED)
    lines = []
    for place in places:
        told = ", ".join(f"`{name}` *{said}*" for (name, where), said in CHECKED.items() if where == place)
        lines.append(f"  - {place}: {told}")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "overview": partial(quality.overview, network="cnn-mnist"),
    "languages": language.short,
    "operations": operations,
    "steps": steps,
    "scissorhands": scissorhands,
    "whole": whole,
    "gpu": gpu,
    "checked": checked,
}


DOCS = ROOT / "docs"
PAGES = {
    README: SECTIONS,
    DOCS / "cost.md": {"targets": targets, "exact": exact, "growth": growth, "cheaper": cheaper, "large": large},
    DOCS / "memory.md": {"memory": memory},
    DOCS / "quality.md": quality.sections(),
    DOCS / "llm-forgetting.md": language.sections(),
    DOCS / "audit.md": {"audit": audit},
    DOCS / "record.md": {"deterministic": deterministic},
}


def filled(page: Path) -> str:
    """A page with every section made anew."""
    text = page.read_text()
    for name, make in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name}: made by bench/report.py -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"{page.name} has {count} sections named {name}, not one")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    after = {page: filled(page) for page in PAGES}
    if parser.parse_args().check:
        return int(any(page.read_text() != text for page, text in after.items()))
    for page, text in after.items():
        page.write_text(text)
    draw()
    quality.draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
