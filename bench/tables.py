"""Tables of what steps cost, from the committed results of a machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORMS = ("cleaned", "as_published")


def steps() -> str:
    """Every step as a ratio to a plain two-loss step, from every `*-step.json`."""
    lines: list[str] = []
    for machine, rows in _results("step"):
        arms = list(dict.fromkeys(arm for row in rows for arm in row["ratio_to_bare"]))
        lines += [f"{machine}. Time ÷ that of a plain two-loss step, median of interleaved rounds:", ""]
        lines += [f"| model, batch, precision | {' | '.join(arms)} |", f"|---{'|---' * len(arms)}|"]
        for row in rows:
            layout = f", {row['memory_format']}" if row["memory_format"] else ""
            case = f"{row['model']}, {row['batch']} + {row['batch']}, {row['precision']}{layout}"
            cells = [f"{row['ratio_to_bare'][arm][0]:.2f}" if arm in row["ratio_to_bare"] else "" for arm in arms]
            lines.append(f"| {case} | {' | '.join(cells)} |")
        wide = [high - low for row in rows for _, low, high in row["ratio_to_bare"].values()]
        wide.sort()
        least = min(cosine for row in rows for cosine in row["alignment_cosine"].values())
        lines += [
            "",
            f"Half of the rounds lie within {wide[len(wide) // 2]:.2f} of each other (median over the cells; worst "
            f"{wide[-1]:.2f}). What displacement adds to the direction was compared with float64: cosine "
            f"{least:.2f} or more in every case.",
            "",
        ]
    return "\n".join(lines).rstrip() or "Not measured."


def scissorhands() -> str:
    """The parts of ScissorHands beside LUR's steps, from every `*-scissorhands.json`."""
    lines: list[str] = []
    for machine, rows in _results("scissorhands"):
        names = [f"{form}: {part}" for part in _parts(rows[0]) for form in FORMS]
        shown = ["LUR, optimistic", "LUR, secant", *names]
        heads = [f"{row['model']}, {row['batch']} + {row['batch']}" for row in rows]
        lines += [f"{machine}. Time ÷ that of a plain two-loss step, [quartiles]:", ""]
        lines += [f"| | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
        for name in shown:
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio_to_bare"][name]) for row in rows]
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
        for form in FORMS:
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["optimistic_to"][form]) for row in rows]
            lines.append(f"| LUR, optimistic ÷ {form.replace('_', ' ')} in conflict | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() or "Not measured."


def _parts(row: dict[str, Any]) -> list[str]:
    return [name.removeprefix("cleaned: ") for name in row["ratio_to_bare"] if name.startswith("cleaned: ")]


def _results(kind: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(the machine in words, the rows) of every result of that kind."""
    found = []
    for path in sorted(RESULTS.glob(f"*-{kind}.json")):
        kept = json.loads(path.read_text())
        made = kept["machine"]
        where = made["gpu"] or f"{made['cpu']}, {made['threads']} threads"
        found.append((f"{where}, torch {made['torch']}", kept["rows"]))
    return found
