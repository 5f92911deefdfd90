"""From a journal to what the report shows: means and deviations over the final seeds, never over tuning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

from .journal import Journal, Row
from .plan import gap, origin, truth
from .splits import FINAL, TUNING
from .trial import FIGURES

GIVEN = ("before", "retrained", "retrained again")  # lines of a table that are no contenders
COLUMNS = (*FIGURES, "loss_auc", "attack", "gap", "rte")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; `missing` of them have no figure, since the run failed."""

    mean: float
    deviation: float
    missing: int = 0

    def shown(self, digits: int = 2) -> str:
        """As in a table."""
        if math.isnan(self.mean):
            return "failed" if self.missing else ""
        lost = f" ({self.missing} failed)" if self.missing else ""
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}{lost}"


def spread(values: list[float | None]) -> Spread:
    """Over the values that are there and finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return Spread(math.nan, math.nan, len(values))
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0, len(values) - len(known))


def finals(journal: Journal, scenario: str) -> dict[str, list[Row]]:
    """The rows of every contender that all final seeds have judged, by name."""
    found: dict[str, list[Row]] = {}
    for key in journal.rows:
        kind, *rest = key.split("/")
        if kind == "final" and rest[0] == scenario:
            found.setdefault(rest[2], [])
    for arm in list(found):
        rows = [journal.rows.get(f"final/{scenario}/{split}/{arm}") for split in FINAL]
        if any(row is None for row in rows):
            del found[arm]
        else:
            found[arm] = [row for row in rows if row is not None]
    return found


def table(journal: Journal, scenario: str) -> dict[str, dict[str, Spread]]:
    """Every line of a scenario's table by name, the smallest gap first; before and truth above all."""
    truths = _whole([truth(scenario, split, journal) for split in FINAL])
    if not truths:
        return {}
    lines: dict[str, dict[str, Spread]] = {}
    given: dict[str, Sequence[Row | None]] = {
        "before": [journal.rows.get(f"before/{scenario}/{split}") for split in FINAL],
        "retrained": truths,
        "retrained again": [truth(scenario, split, journal, 1) for split in FINAL],
    }
    for name in GIVEN:
        rows = _whole(given[name])
        timed = [row | {"rte": row["seconds"]} if "seconds" in row else row for row in rows]
        if rows:
            lines[name] = _line(timed, truths)
    made = {arm: _line(rows, truths) for arm, rows in finals(journal, scenario).items()}
    order = sorted(made, key=lambda arm: (made[arm]["gap"].missing, made[arm]["gap"].mean))
    return lines | {arm: made[arm] for arm in order}


def gaps(journal: Journal, scenario: str, arm: str) -> list[float]:
    """The gap of each final seed."""
    rows = finals(journal, scenario).get(arm, [])
    truths = _whole([truth(scenario, split, journal) for split in FINAL])
    return [gap(row, reference) for row, reference in zip(rows, truths, strict=True)] if rows and truths else []


def difference(one: list[float], other: list[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of one − other seed by seed, and half the width of its confidence interval by Student's t."""
    each = [x - y for x, y in zip(one, other, strict=True)]
    if len(each) < 2 or not all(math.isfinite(x) for x in each):
        return statistics.fmean(each) if each else math.nan, math.inf
    quantile = float(t.ppf(0.5 + level / 2, len(each) - 1))
    return statistics.fmean(each), quantile * statistics.stdev(each) / math.sqrt(len(each))


def shared(journal: Journal, scenario: str, arm: str, base: str, trials: int) -> tuple[float, float] | None:
    """The same difference over the trials of tuning, point by point, where both runs came through."""
    reference, pairs = truth(scenario, TUNING[0], journal), []
    for number in range(trials):
        rows = [journal.rows.get(f"trial/{scenario}/{TUNING[0]}/{name}/{number}") for name in (arm, base)]
        if reference and all(row is not None and "error" not in row for row in rows):
            pairs.append(tuple(gap(row, reference) for row in rows if row is not None))
    if len(pairs) < 2:
        return None
    return difference([x for x, _ in pairs], [y for _, y in pairs])


def settings(journal: Journal, scenario: str, study: str) -> dict[str, Spread]:
    """The gaps of the configurations of a study that were compared as they are, over the tuning splits, by name."""
    found: dict[str, list[float | None]] = {}
    for key, row in journal.rows.items():
        kind, *rest = key.split("/")
        if kind == "trial" and rest[0] == scenario and rest[2].startswith(study):
            reference = truth(scenario, rest[1], journal)
            if reference:
                found.setdefault(rest[2].removeprefix(study), []).append(gap(row, reference))
    return {name: spread(values) for name, values in found.items()}


def training(journal: Journal, scenario: str) -> float | None:
    """Seconds that the model as given took, mean over the final seeds."""
    rows = [journal.rows.get(origin(scenario, split).key) for split in FINAL]
    known = [row["seconds"] for row in rows if row]
    return statistics.fmean(known) if known else None


def config(row: Row) -> str:
    """What was chosen, in a few words."""
    made: dict[str, Any] = row["config"]
    parts = [] if made["lr"] is None else [f"lr {made['lr']:g}"]
    parts += [f"{name} {_short(value)}" for name, value in made["method"].items() if name != "relative_inner_lr"]
    parts += [f"{name} {made[name]}" for name in ("trim", "mask") if made[name] is not None]
    if "max_grad_norm" in made:
        parts.append("not clipped" if made["max_grad_norm"] is None else f"clipped to {made['max_grad_norm']:.3g}")
    if made["target"] != "own":
        parts.append("LUR's novice" if made["target"] == "default" else made["target"])
    return ", ".join([*parts, made["schedule"]] if made["schedule"] != "linear" else parts) or "as it comes"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _whole(rows: Sequence[Row | None]) -> list[Row]:
    """The rows if all of them are there, or none."""
    known = [row for row in rows if row is not None]
    return known if len(known) == len(rows) else []


def _line(rows: list[Row], truths: list[Row]) -> dict[str, Spread]:
    found: dict[str, Spread] = {name: spread([row.get(name) for row in rows]) for name in COLUMNS if name != "gap"}
    return found | {"gap": spread([gap(row, each) for row, each in zip(rows, truths, strict=True)])}
