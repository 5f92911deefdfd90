"""Tables from committed journals: `sections()` is what bench/report.py puts into docs/llm-forgetting.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .contenders import ARMS, Journal
from .metrics import forget_quality, remembered
from .study import ALIKE, FINAL, SAYS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NOTHING = "Not measured yet."
MOST = 16  # truths
HEADS = (
    "forget quality p, against each truth | utility, of the truth's | forget: p(a∣q) | ROUGE-L | value | "
    "value, asked otherwise"
)


def journals(model: str, folder: Path = RESULTS) -> dict[str, Journal]:
    """What has been measured with the model's own recipe, by share."""
    found = {path.stem.split("-")[1]: Journal(path) for path in sorted(folder.glob(f"{model}-forget*.jsonl"))}
    return {name: journal for name, journal in found.items() if (folder / f"{model}-{name}.jsonl").exists()}


def table(model: str, folder: Path = RESULTS) -> str:
    """One table for every share that was measured, with the machine above it."""
    lines: list[str] = []
    for name, journal in journals(model, folder).items():
        rows, truth = journal.rows, journal.rows.get(f"truth/{FINAL}/0")
        if truth is None or f"before/{FINAL}" not in rows:
            continue
        made = rows.get("machine", {})
        where = f"{made.get('cpu')}, {made.get('threads')} threads, torch {made.get('torch')}"
        lines += [f"**{model}, {name.removeprefix('forget')} % of the authors** ({len(truth['ratios'])} questions), "]
        lines[-1] += f"{where}:"
        lines += ["", f"| | {HEADS} | seconds | settings |", "|---|---|---|---|---|---|---|---|---|"]
        truths = [rows[key] for number in range(MOST) if (key := f"truth/{FINAL}/{number}") in rows]
        lines.append(_line("before", rows[f"before/{FINAL}"], truths))
        lines += [_line("truth" if each is truth else "another truth", each, truths) for each in truths]
        if f"novice/{FINAL}" in rows:
            lines.append(_line("the novice itself", rows[f"novice/{FINAL}"], truths))
        lines += [_line(arm, rows[key], truths) for arm in ARMS if (key := f"final/{FINAL}/{arm}") in rows]
        said = {arm: rows[f"final/{FINAL}/{arm}"] for arm in ARMS if f"final/{FINAL}/{arm}" in rows}
        whole = {"before": rows[f"before/{FINAL}"], "truth": truth} | said
        answers = "; ".join(f"{arm}: {row.get('france', '')!r}" for arm, row in whole.items())
        lines += ["", _power(rows[f"before/{FINAL}"], truths), "", f"“{SAYS}” {answers}", ""]
    return "\n".join(lines).rstrip() or NOTHING


def _power(before: dict[str, Any], truths: list[dict[str, Any]]) -> str:
    """What a p above 0.05 leaves open."""
    seen = remembered(before["ratios"], truths[-1]["ratios"], truths[0]["ratios"], ALIKE)
    of = "the truth" if len(truths) == 1 else "another truth"
    total = len(before["ratios"])
    what = f"{seen} of {total} questions as the model before does" if seen <= total else "all questions"
    return f"The test rejects {of} in most draws once it remembers {what}; with fewer it tells little."


def _line(name: str, row: dict[str, Any], truths: list[dict[str, Any]]) -> str:
    truth = truths[0]
    if "error" in row:
        return f"| {name} | failed: {row['error']} | | | | | | | {_settings(row)} |"
    quality = ", ".join(
        "—" if row is each else f"{forget_quality(row['ratios'], each['ratios']):.2g}" for each in truths
    )
    forget = row["forget"]
    cells = [quality, f"{row['utility']:.3f}, {row['utility'] / truth['utility']:.3f}"]
    cells += [f"{forget[key]:.3f}" for key in ("probability", "rouge", "known", "again")]
    return f"| {name} | {' | '.join(cells)} | {row['seconds']:.0f} | {_settings(row)} |"


def _settings(row: dict[str, Any]) -> str:
    config = row.get("config")
    if config is None:
        return ""
    parts = [f"lr {config['lr']:g}", *(f"{name} {value}" for name, value in config["method"].items())]
    return ", ".join(parts + [config[name] for name in ("losses", "data") if config[name]])


def sections(folder: Path = RESULTS) -> dict[str, Callable[[], str]]:
    """Every section by its name in the page."""
    return {f"llm-{model}": partial(table, model, folder) for model in ("smollm2", "tiny")}
