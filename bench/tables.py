"""Tables of what steps cost and hold, from the committed results of a machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import AS_IT_COMES, FORMS, MODES, PARTED

RESULTS = Path(__file__).parent / "results"


def steps() -> str:
    """Every step as a ratio to a plain two-loss step, from every `*-step.json`."""
    lines: list[str] = []
    for machine, rows in results("step"):
        arms = list(dict.fromkeys(arm for row in rows for arm in row["ratio_to_bare"]))
        lines += [f"{machine}. Time ÷ that of a plain two-loss step in the same round, medians:", ""]
        lines += [f"| model, batch, precision (rounds) | {' | '.join(arms)} |", f"|---{'|---' * len(arms)}|"]
        for row in rows:
            checked = {arm for arm in arms if arm.split(",")[0] not in MODES} | set(row["alignment_cosine"])
            shown = checked & set(row["ratio_to_bare"])  # no figure of a step that nobody has looked at
            layout = f", {row['memory_format']}" if row["memory_format"] else ""
            case = f"{row['model']}, {row['batch']} + {row['batch']}, {row['precision']}{layout} ({row['rounds']})"
            cells = [f"{row['ratio_to_bare'][arm][0]:.2f}" if arm in shown else "" for arm in arms]
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
    for machine, rows in results("scissorhands"):
        names = [f"{form}: {part}" for part in _parts(rows[0]) for form in PARTED]
        shown = ["LUR, optimistic", f"LUR, {AS_IT_COMES}", "LUR, secant", *names]
        heads = [f"{row['model']}, {row['batch']} + {row['batch']}" for row in rows]
        lines += [f"{machine}. Time ÷ that of a plain two-loss step, [quartiles]:", ""]
        lines += [f"| | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
        for name in shown:
            if name not in rows[0]["ratio_to_bare"]:
                continue  # what the forms have in common is measured once
            lines.append(_line(name.replace("_", " "), [row["ratio_to_bare"].get(name) for row in rows]))
        for form, said in PARTED.items():
            lines.append(_line(f"LUR, optimistic ÷ {said} in conflict", [row["optimistic_to"][form] for row in rows]))
        without = [row.get("optimistic_to_without_collection") for row in rows]
        lines.append(_line("LUR, optimistic ÷ as published, had collecting garbage cost nothing", without))
        for form, said in PARTED.items():
            whole = [row.get("as_it_comes_to", {}).get(form) for row in rows]
            lines.append(_line(f"LUR, as it comes ÷ {said} in conflict", whole))
        lines.append("")
    return "\n".join(lines).rstrip() or "Not measured."


def _line(name: str, found: list[Sequence[float] | None]) -> str:
    """A row of medians with quartiles; an empty cell where one was not measured."""
    cells = ["" if each is None else "{:.2f} [{:.2f}, {:.2f}]".format(*each) for each in found]
    return f"| {name} | {' | '.join(cells)} |"


def whole() -> str:
    """Whole runs to the same gaps, from every `*-whole.json`."""
    lines: list[str] = []
    for machine, rows in results("whole"):
        runs = [row for row in rows if "arm" in row]
        seeds = len({run["seed"] for run in runs})
        tries = len({(run["rate"], run["steps"]) for run in runs})
        said = f"{tries} settings an arm, mean of {seeds} seeds" if seeds > 1 else f"{tries} settings an arm"
        lines += [f"{machine}, digits, {said}. Seconds until the gap is reached:", ""]
        arms = list(dict.fromkeys(run["arm"] for run in runs))
        lines += [f"| gap | {' | '.join(arms)} |", f"|---{'|---' * len(arms)}|"]
        for label, each in next(row["to_the_gap"] for row in rows if "to_the_gap" in row).items():
            cells = ["never" if (spent := each["seconds"][arm]) is None else f"{spent:.2f}" for arm in arms]
            lines.append(f"| {each['gap']:.2f}, {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() or "Not measured."


def memory() -> str:
    """What every arm holds beyond the parameters, and how far the prediction is off, from every `*-memory.json`."""
    lines: list[str] = []
    for machine, rows in results("memory"):
        arms = list(dict.fromkeys(arm for row in rows for arm in row["extra"]))
        heads = [f"{row['model']}, {row['batch']} + {row['batch']}" for row in rows]
        lines += [f"{machine}. Peak beyond the parameters, MiB (error of the predicted peak):", ""]
        lines += [f"| | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
        lines.append(f"| *parameters* | {' | '.join(str(round(row['parameters'])) for row in rows)} |")
        for arm in arms:
            lines.append(f"| {arm} | {' | '.join(_held(row, arm) for row in rows)} |")
        for form in FORMS:
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


def results(kind: str, where: str = "") -> list[tuple[str, list[dict[str, Any]]]]:
    """(the machine in words, the rows) of every result of that kind; parts recorded on one machine are one result.

    Args:
        kind: what the name of a file ends with.
        where: what it begins with.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(each for each in RESULTS.glob(f"*-{kind}.json") if each.stem.startswith(where)):
        kept = json.loads(path.read_text())
        made = kept["machine"]
        on = made["gpu"] or f"{made['cpu']}, {made['threads']} threads"
        rows = found.setdefault(f"{on}, torch {made['torch']}", [])
        twice = [row for row in kept["rows"] if _case(row) is not None and _case(row) in map(_case, rows)]
        if twice:
            raise SystemExit(f"{path.name} has again what another result has: {_case(twice[0])}; remove one of them")
        rows.extend(kept["rows"])
    return list(found.items())


def _case(row: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a row of models is about; None for other rows."""
    if "model" not in row or "batch" not in row:
        return None
    return tuple(row.get(key) for key in ("model", "batch", "precision", "memory_format"))
