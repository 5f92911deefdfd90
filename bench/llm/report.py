"""Tables from committed journals: `sections()` is what bench/report.py puts into docs/llm-forgetting.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numpy import quantile

from .contenders import ARMS, SUFFIXES, Journal
from .metrics import forget_quality, remembered
from .models import RECIPES
from .study import ALIKE, FINAL, SAYS, Study, distance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NOTHING = "Not measured yet."
MOST = 16  # truths
HEADS = (
    "forget quality p, against each truth | truth ratio: a tenth, half, nine tenths below | utility, of the truth's | "
    "retained: ROUGE-L | forget: p(a∣q) | ROUGE-L | value | value, asked otherwise"
)
DECILES = (0.1, 0.5, 0.9)


def journals(model: str, folder: Path = RESULTS) -> dict[str, Journal]:
    """What has been measured with the model's own recipe, by share."""
    found = {path.stem.split("-")[1]: Journal(path) for path in sorted(folder.glob(f"{model}-forget*.jsonl"))}
    return {name: journal for name, journal in found.items() if (folder / f"{model}-{name}.jsonl").exists()}


def rows_of(model: str, journal: Journal) -> dict[str, Any]:
    """The rows of the model's recipe as it is now."""
    mark = Study(model, recipe=RECIPES[model]).mark
    return {key: row for key, row in journal.rows.items() if key == "machine" or row.get("recipe") == mark}


def named(rows: dict[str, Any]) -> dict[str, Any]:
    """Judged models by the name that a table gives them, in its order."""
    keys = {"before": f"before/{FINAL}", "truth": f"truth/{FINAL}/0"}
    keys |= {f"truth {number + 1}": f"truth/{FINAL}/{number}" for number in range(1, MOST)}
    keys |= {"the novice itself": f"novice/{FINAL}"}
    early = sorted(int(key.rpartition("/")[2]) for key in rows if key.startswith(f"retrained/{FINAL}/"))
    keys |= {f"retrained for {number} epochs": f"retrained/{FINAL}/{number}" for number in early}
    arms = (name + suffix for name in ARMS for suffix in ("", *SUFFIXES))  # tries beside each other
    keys |= {arm: f"final/{FINAL}/{arm}" for arm in arms if arm in ARMS}
    return {name: rows[key] for name, key in keys.items() if key in rows}


def table(model: str, folder: Path = RESULTS) -> str:
    """One table for every share that was measured, with the machine above it."""
    lines: list[str] = []
    for name, journal in journals(model, folder).items():
        rows = rows_of(model, journal)
        judged, made = named(rows), rows.get("machine", {})
        if not {"before", "truth"} <= set(judged):
            continue
        where = f"{made.get('cpu')}, {made.get('threads')} threads, torch {made.get('torch')}"
        total = len(judged["truth"]["ratios"])
        lines += [f"**{model}, {name.removeprefix('forget')} % of the authors** ({total} questions), {where}:", ""]
        lines += [f"| | {HEADS} | seconds | settings |", "|---" * 11 + "|"]
        truths = [row for key, row in judged.items() if key.startswith("truth")]
        lines += [_line(key, row, truths) for key, row in judged.items()]
        lines += ["", _power(judged["before"], truths), "", f"“{SAYS}” {_answers(judged)}", ""]
    return "\n".join(lines).rstrip() or NOTHING


def short(folder: Path = RESULTS) -> str:
    """What the README shows of the real model; of a method that had several tries the nearest to the goal."""
    rows = rows_of("smollm2", Journal(folder / "smollm2-forget10.jsonl"))
    judged = named(rows)
    if not {"before", "truth"} <= set(judged):
        return NOTHING
    truth = judged["truth"]
    for name in ARMS:
        tried = [each for each in (name, *(name + suffix for suffix in SUFFIXES)) if each in judged]
        for worse in sorted(tried, key=lambda each: distance(judged[each], truth))[1:]:
            del judged[worse]
    lines = ["| | p | utility ÷ truth's | value | value, asked otherwise | seconds |", "|---|---|---|---|---|---|"]
    for name, row in judged.items():
        if "error" in row:
            lines.append(f"| {name} | failed | | | | |")
            continue
        said = " | ".join(f"{row['forget'][key]:.3f}" for key in ("known", "again"))
        lines.append(
            f"| {name} | {_p(row, truth)} | {row['utility'] / truth['utility']:.3f} | {said} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _answers(judged: dict[str, Any]) -> str:
    """Who gives which, the most frequent first."""
    found: dict[str, list[str]] = {}
    for name, row in judged.items():
        if "error" not in row:
            found.setdefault(row["france"], []).append(name)
    return "; ".join(f"{said!r}: {', '.join(names)}" for said, names in sorted(found.items(), key=lambda x: -len(x[1])))


def _power(before: dict[str, Any], truths: list[dict[str, Any]]) -> str:
    """What a p above 0.05 leaves open."""
    seen = remembered(before["ratios"], truths[-1]["ratios"], truths[0]["ratios"], ALIKE)
    of = "the truth" if len(truths) == 1 else "another truth"
    total = len(before["ratios"])
    what = f"{seen} of {total} questions as the model before does" if seen <= total else "all questions"
    return f"The test rejects {of} in most draws once it remembers {what}; with fewer it tells little."


def _p(row: dict[str, Any], truth: dict[str, Any]) -> str:
    return "—" if row is truth else f"{forget_quality(row['ratios'], truth['ratios']):.2g}"


def _line(name: str, row: dict[str, Any], truths: list[dict[str, Any]]) -> str:
    truth = truths[0]
    if "error" in row:
        return f"| {name} | failed: {row['error']} | | | | | | | | | {_settings(row)} |"
    quality = ", ".join(_p(row, each) for each in truths)
    forget = row["forget"]
    cells = [quality, ", ".join(f"{ratio:.2f}" for ratio in quantile(row["ratios"], DECILES))]
    cells += [f"{row['utility']:.3f}, {row['utility'] / truth['utility']:.3f}"]
    cells += [f"{row['parts']['retain']['rouge']:.3f}"]
    cells += [f"{forget[key]:.3f}" for key in ("probability", "rouge", "known", "again")]
    return f"| {name} | {' | '.join(cells)} | {row['seconds']:.0f} | {_settings(row)} |"


def _settings(row: dict[str, Any]) -> str:
    config = row.get("config")
    if config is None:
        return ""
    longer = [f"{row['steps']} steps"] if config.get("longer") and "steps" in row else []  # a run that failed has none
    parts = [f"lr {config['lr']:g}", *longer]
    parts += [f"{name} {value}" for name, value in config["method"].items()]
    return ", ".join(parts + [config[name] for name in ("losses", "data") if config[name]])


def sections(folder: Path = RESULTS) -> dict[str, Callable[[], str]]:
    """Every section by its name in the page."""
    return {f"llm-{model}": partial(table, model, folder) for model in ("smollm2", "tiny")}
