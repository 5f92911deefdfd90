"""Tables of what steps cost and hold, from the committed results of a machine."""

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


def memory() -> str:
    """What every arm holds beyond the parameters, and how far the prediction is off, from every `*-memory.json`."""
    lines: list[str] = []
    for machine, rows in _results("memory"):
        arms = list(dict.fromkeys(arm for row in rows for arm in row["extra"]))
        heads = [f"{row['model']}, {row['batch']} + {row['batch']}" for row in rows]
        lines += [f"{machine}. Peak beyond the parameters, MiB (error of the predicted peak):", ""]
        lines += [f"| | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
        lines.append(f"| *parameters* | {' | '.join(str(round(row['parameters'])) for row in rows)} |")
        for arm in arms:
            lines.append(f"| {arm} | {' | '.join(_held(row, arm) for row in rows)} |")
        for form in ("scissorhands, cleaned", "scissorhands, as published"):
            for part, said in (("in_steps", "a step in conflict"), ("whole", "the whole run")):
                ratios = [row["optimistic_to"].get(form, {}).get(part) for row in rows]
                cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
                lines.append(f"| *optimistic ÷ {form}, {said}* | {' | '.join(cells)} |")
        errors = sorted(abs(error) for row in rows for error in row["error_of_peak"].values())
        times = sorted(
            row["seconds_predicted"][arm] / row["seconds"][arm] for row in rows for arm in row["seconds_predicted"]
        )
        middle, low, high = (times[len(times) * place // 4] for place in (2, 1, 3))
        lines += [
            "",
            f"Predicted peaks are {errors[len(errors) // 2]:.1%} off in the median, {errors[-1]:.1%} at worst; seconds "
            f"per step, predicted ÷ measured: {middle:.2f} in the median, half of them from {low:.2f} to {high:.2f}.",
            "",
        ]
    return "\n".join(lines).rstrip() or "Not measured."


def _held(row: dict[str, Any], arm: str) -> str:
    if arm in row["too_large"]:
        return "too large"
    if arm not in row["extra"]:
        return ""
    error = row["error_of_peak"].get(arm)
    return f"{row['extra'][arm]:.0f}" + ("" if error is None else f" ({error:+.1%})")


def _parts(row: dict[str, Any]) -> list[str]:
    return [name.removeprefix("cleaned: ") for name in row["ratio_to_bare"] if name.startswith("cleaned: ")]


def _results(kind: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(the machine in words, the rows) of every result of that kind; parts recorded on one machine are one result."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob(f"*-{kind}.json")):
        kept = json.loads(path.read_text())
        made = kept["machine"]
        where = made["gpu"] or f"{made['cpu']}, {made['threads']} threads"
        found.setdefault(f"{where}, torch {made['torch']}", []).extend(kept["rows"])
    return list(found.items())
