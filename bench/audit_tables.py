"""Tables of what the attacks found and of what deterministic mode costs, from committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def audit() -> str:
    """Both attacks, from every `*-relearning-*.json` and `*-inversion-*.json`."""
    lines = []
    for attack, table in {"relearning": _relearning, "inversion": _inversion}.items():
        kept = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*-{attack}-*.json"))]
        lines += [f"### {attack.capitalize()}", "", *table([row for each in kept for row in each["rows"]]), ""]
        made = kept[0]["machine"]
        lines += [f"seed {made['seed']}, torch {made['torch']}, {made['cpu']}", ""]
    return "\n".join(lines).rstrip()


def _relearning(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    places = [first["steps"].index(step) for step in (0, 3, 5, 10, 20)]
    heads = " | ".join(f"step {first['steps'][place]}" for place in places)
    lines = [
        "Accuracy on the forget items not shown, percent, and the advantage over retrained models ± its standard "
        "error, in points; as many retain items are mixed into every batch. *nothing*: the model as it was; *retrain*: "
        "one more that never knew.",
        "",
        f"| network | | method | {heads} | retrained, step 5 | advantage | comes back faster |",
        f"|---|---|---|{'---|' * len(places)}---|---|---|",
    ]
    for row in rows:
        mine, theirs = row["accuracy"]["unlearned"], row["accuracy"]["retrained"]
        cells = " | ".join(f"{mine[place]:.0f}" for place in places)
        ahead = f"{row['advantage']:+.1f} ± {row['error']:.1f}"
        lines.append(
            f"| {row['network']} | {row['scenario']} | {row['method']} | {cells} | "
            f"{theirs[row['steps'].index(5)]:.0f} | {ahead} | {_yes(row['comes_back'])} |"
        )
    return lines


def _inversion(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "*label*: share of the forget items of the class guessed / of the others, percent. *told*: probability that a "
        "forget item's gradient lies closer to the change than another's (½: chance). *similar*: how much forget items "
        "look like a reconstruction / others / forget items like one from noise, in [−1, 1].",
        "",
        "| network | | method | others | label | told | items told | similar | items shown |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        label = "none" if row["label"] is None else f"{100 * row['label_right']:.0f} / {100 * row['label_chance']:.0f}"
        alike = " / ".join(f"{row[name]:.2f}" for name in ("similarity", "similarity_others", "similarity_noise"))
        lines.append(
            f"| {row['network']} | {row['scenario']} | {row['method']} | {row['others']} | {label} | "
            f"{row['alignment_auc']:.2f} | {_yes(row['tells_items'])} | {alike} | {_yes(row['shows_items'])} |"
        )
    return lines


def _yes(value: bool) -> str:
    return "**yes**" if value else "no"


def deterministic() -> str:
    """From every `*-deterministic.json`."""
    lines, places = [], set()
    for path in sorted(RESULTS.glob("*-deterministic.json")):
        kept = json.loads(path.read_text())
        made, (row,) = kept["machine"], kept["rows"]
        place = path.name.split("-")[0]
        places.add(place)
        middle, low, high = row["ratio"]
        where = "CPU" if place == "cpu" else made["gpu"]
        lines.append(
            f"On the {where} it takes {middle:.2f} times as long (quartiles [{low:.2f}, {high:.2f}] of "
            f"{row['rounds']} pairs of runs of {row['steps']} steps of the demo; `python -m "
            "bench.deterministic`)."
        )
    if "cuda" not in places:
        lines.append("On a GPU: not measured.")
    return "\n".join(lines)
