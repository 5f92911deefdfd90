"""Tables and pictures from committed journals: `sections()` is what bench/report.py puts into docs/quality.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .contenders import ALIGNMENT, DEFAULT, DIRECTIONS, WEIGHED, WEIGHTS, candidates
from .journal import Journal
from .plan import GRIDS
from .scenarios import SCENARIOS, TITLES
from .summary import GIVEN, Spread, config, difference, finals, gaps, settings, shared, table

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
RESULTS = HERE / "results"
BASE = "align-joint"
HEADS = {"ua": "UA", "ra": "RA", "ta": "TA", "mia": "MIA", "loss_auc": "loss-AUC", "attack": "attack rate"}
NOTHING = "Not measured yet."


def journals(folder: Path = RESULTS) -> dict[str, Journal]:
    """What has been measured, by network and data set; runs of the plumbing have other names and are left out."""
    return {path.stem: Journal(path) for path in sorted(folder.glob("*.jsonl")) if path.stem.count("-") == 1}


def scenario_table(scenario: str, folder: Path = RESULTS) -> str:
    """One table for each network that was measured."""
    lines: list[str] = []
    for name, journal in journals(folder).items():
        found = compared(journal, scenario)
        if not judged(found):
            continue
        heads = {key: head for key, head in HEADS.items() if key != "attack" or scenario == "backdoor"}
        lines += [f"**{name.replace('-', ', ')}**", ""]
        lines += [f"| | {' | '.join(heads.values())} | gap | seconds | chosen |", f"|---{'|---' * (len(heads) + 3)}|"]
        rows = finals(journal, scenario)
        for arm, line in found.items():
            cells = [line[key].shown(3 if key == "loss_auc" else 2) for key in heads]
            said = config(rows[arm][0]) if arm in rows else ""
            whole = "" if arm == "before" else line["rte"].shown(1)
            lines.append(f"| {arm} | {' | '.join(cells)} | {line['gap'].shown()} | {whole} | {said} |")
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


def overview(folder: Path = RESULTS, network: str | None = None) -> str:
    """The gap of every contender in every scenario; of one network and data set, or of all."""
    lines: list[str] = []
    for name, journal in journals(folder).items():
        if network not in (None, name):
            continue
        found = {scenario: compared(journal, scenario) for scenario in SCENARIOS}
        arms = list(dict.fromkeys(arm for each in found.values() for arm in each if arm != "retrained"))  # 0
        if not any(map(judged, found.values())):
            continue
        lines += [f"**{name.replace('-', ', ')}**, average gap in points:", ""]
        lines += [f"| | {' | '.join(SCENARIOS)} |", f"|---{'|---' * len(SCENARIOS)}|"]
        for arm in arms:
            cells = []
            for each in found.values():
                contenders = [each[other]["gap"].mean for other in judged(each)]
                shown = each[arm]["gap"].shown() if arm in each else ""
                best = shown and arm not in GIVEN and each[arm]["gap"].mean == min(contenders) and len(contenders) > 1
                cells.append(f"**{shown}**" if best else shown)
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


def bounds(folder: Path = RESULTS) -> str:
    """The call with three arguments beside the best tuned method, and what was asked of it."""

    def cells(journal: Journal, scenario: str) -> list[str]:
        found = compared(journal, scenario)
        if DEFAULT not in found or not tuned(found):
            return []
        first = tuned(found)[0]
        best, default = found[first], found[DEFAULT]
        asked = allowed(best["gap"].mean)
        held = "held" if default["gap"].mean <= asked else "**missed**"
        shown = [default["gap"].shown(), f"{first}: {best['gap'].shown()}", f"≤ {asked:.2f}", held]
        return shown + [each["rte"].shown(1) for each in (default, best, found["retrained"])]

    heads = ["default", "best tuned", "asked", "", "default, s", "best, s", "retraining, s"]
    return _tables(folder, "average gap in points, and seconds", heads, cells)


def _tables(folder: Path, said: str, heads: list[str], cells: Callable[[Journal, str], list[str]]) -> str:
    """A table for each network, with a line for each scenario of which there is something to show."""
    lines: list[str] = []
    for name, journal in journals(folder).items():
        rows = {scenario: cells(journal, scenario) for scenario in SCENARIOS}
        shown = [f"| {scenario} | {' | '.join(row)} |" for scenario, row in rows.items() if row]
        if shown:
            head = "".join(f"| {one} " if one else "| " for one in ("", *heads)) + "|"
            lines += [f"**{name.replace('-', ', ')}**, {said}:", "", head, f"|---{'|---' * len(heads)}|", *shown, ""]
    return "\n".join(lines).rstrip() or NOTHING


def allowed(best: float) -> float:
    """The gap that the default may have where the best tuned method has this one."""
    return max(1.3 * best, best + 0.5)


def compared(journal: Journal, scenario: str) -> dict[str, dict[str, Spread]]:
    """The lines of a scenario's table, without the arms of the studies of alignment."""
    return {arm: line for arm, line in table(journal, scenario).items() if not arm.startswith(("align-", "weighed-"))}


def judged(lines: dict[str, dict[str, Spread]]) -> list[str]:
    """The contenders of a scenario's table, the smallest gap first."""
    return [arm for arm in lines if arm not in GIVEN]


def tuned(lines: dict[str, dict[str, Spread]]) -> list[str]:
    """Those that were searched for, not the call with three arguments."""
    return [arm for arm in judged(lines) if arm != DEFAULT]


def lead(folder: Path = RESULTS) -> str:
    """LUR beside the nearest of the others, and how far a network is from another that was retrained likewise."""

    def cells(journal: Journal, scenario: str) -> list[str]:
        found = compared(journal, scenario)
        others = [arm for arm in tuned(found) if arm != "lur"]
        if "lur" not in found or not others:
            return []
        mine, other = found["lur"], found[others[0]]
        apart = difference(gaps(journal, scenario, "lur"), gaps(journal, scenario, others[0]))
        again = found["retrained again"]["gap"].shown() if "retrained again" in found else ""
        shown = [mine["gap"].shown(), f"{others[0]}: {other['gap'].shown()}", _signed(apart), again]
        return shown + [each["rte"].shown(1) for each in (mine, other)]

    heads = ["lur", "nearest other", "difference", "retrained again", "lur, s", "other, s"]
    return _tables(folder, "average gap in points, and seconds", heads, cells)


def alignment(folder: Path = RESULTS) -> str:
    """The difference of every way to align to the joint loss, seed by seed, and point by point of the search."""
    return _beside(BASE, [arm for arm in ALIGNMENT if arm != BASE], GRIDS["alignment"].trials, folder)


def weighed(folder: Path = RESULTS) -> str:
    """The same for LUR in the space that the joint loss is searched in."""
    return _beside("joint", [arm for arm in WEIGHED if arm != "joint"], GRIDS["weighed"].trials, folder)


def _beside(base_arm: str, arms: list[str], trials: int, folder: Path) -> str:
    def cells(journal: Journal, scenario: str) -> list[str]:
        base = gaps(journal, scenario, base_arm)
        if not base or not any(gaps(journal, scenario, arm) for arm in arms):
            return []
        shown = [f"{sum(base) / len(base):.2f}"]
        for arm in arms:
            mine = gaps(journal, scenario, arm)
            cell = _signed(difference(mine, base)) if mine else ""
            over = shared(journal, scenario, arm, base_arm, trials)
            shown.append(cell + (f" ({_signed(over)})" if over else ""))
        return shown

    said = "gap of the joint loss, and difference to it ± half the 95 % interval over the final seeds "
    heads = ["joint", *(arm.removeprefix("align-").removeprefix("weighed-") for arm in arms)]
    return _tables(folder, said + "(over the points of the search)", heads, cells)


def targets(folder: Path = RESULTS) -> str:
    """The candidates for a default, at one setting, on the tuning splits."""
    lines: list[str] = []
    for name, journal in journals(folder).items():
        found = {scenario: settings(journal, scenario, "target-") for scenario in SCENARIOS}
        if not any(found.values()):
            continue
        lines += [f"**{name.replace('-', ', ')}**, average gap in points on the tuning splits:", ""]
        lines += [f"| target | gradient | {' | '.join(SCENARIOS)} |", f"|---|---{'|---' * len(SCENARIOS)}|"]
        for candidate in candidates():
            _, target, gradient = candidate.split("-", 2)
            each = [found[scenario].get(f"{target}-{gradient}") for scenario in SCENARIOS]
            cells = [one.shown() if one else "" for one in each]
            lines.append(f"| {target.replace('_', ' ')} | {gradient} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() or NOTHING


def weights(folder: Path = RESULTS) -> str:
    """The gap of every direction at every forget weight, on the tuning splits."""
    lines: list[str] = []
    for name, journal in journals(folder).items():
        rows = []
        for scenario in SCENARIOS:
            found = settings(journal, scenario, "weight-")
            for direction in DIRECTIONS if found else ():
                each = [found.get(f"{weight:g}-{direction}") for weight in WEIGHTS]
                cells = [one.shown() if one else "" for one in each]
                rows.append(f"| {scenario} | {direction} | {' | '.join(cells)} |")
        if rows:
            heads = " | ".join(f"{weight:g}" for weight in WEIGHTS)
            lines += [f"**{name.replace('-', ', ')}**, average gap in points on the tuning splits, by weight:", ""]
            lines += [f"| | direction | {heads} |", f"|---|---{'|---' * len(WEIGHTS)}|", *rows, ""]
    return "\n".join(lines).rstrip() or NOTHING


def sections(folder: Path = RESULTS) -> dict[str, Callable[[], str]]:
    """Every section by its name in the page."""
    found: dict[str, Callable[[], str]] = {
        "overview": partial(overview, folder),
        "bounds": partial(bounds, folder),
        "lead": partial(lead, folder),
        "alignment": partial(alignment, folder),
        "weighed": partial(weighed, folder),
        "targets": partial(targets, folder),
        "weights": partial(weights, folder),
    }
    return found | {scenario: partial(scenario_table, scenario, folder) for scenario in SCENARIOS}


def draw(docs: Path = DOCS, folder: Path = RESULTS) -> list[Path]:
    """One picture a scenario in which methods were compared: gaps with their deviations, and what they took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for scenario in SCENARIOS:
        found = {name: compared(journal, scenario) for name, journal in journals(folder).items()}
        found = {name: lines for name, lines in found.items() if tuned(lines)}
        if not found:
            continue
        heights = [2.0 + 0.24 * len(judged(lines)) for lines in found.values()]  # inches: as many bars as fit
        figure, grid = pyplot.subplots(len(found), 2, figsize=(12, sum(heights)), squeeze=False, height_ratios=heights)
        for (left, right), (name, lines) in zip(grid, found.items(), strict=True):
            arms = judged(lines)
            colours = ["#1a73e8" if arm == "lur" else "#9aa0a6" for arm in arms]
            middle = [lines[arm]["gap"].mean for arm in arms]
            error = [lines[arm]["gap"].deviation for arm in arms]
            left.barh(arms, middle, xerr=error, color=colours, capsize=2)
            left.axvline(lines["before"]["gap"].mean, color="#d93025", linestyle=":", label="before")
            left.set(xscale="symlog", xlabel="average gap to the retrained model, points", title=name)
            left.invert_yaxis()
            if "retrained again" in lines:
                again = lines["retrained again"]["gap"].mean
                left.axvline(again, color="#188038", linestyle=":", label="retrained again")
            left.legend(fontsize=8)
            spent = [lines[arm]["rte"].mean for arm in arms]
            right.scatter(spent, middle, c=colours)
            for arm, x, y in zip(arms, spent, middle, strict=True):
                right.annotate(arm, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
            right.axvline(lines["retrained"]["rte"].mean, color="#188038", linestyle=":", label="retraining")
            right.set(xlabel="seconds of one core", ylabel="average gap, points", yscale="symlog")
            right.legend(fontsize=8)
            right.grid(True, alpha=0.3)
        figure.suptitle(TITLES[scenario])
        figure.tight_layout()
        path = docs / f"quality-{scenario}.png"
        figure.savefig(path, format="png", dpi=90, metadata={"Software": None})
        pyplot.close(figure)
        made.append(path)
    return [*made, *_draw_cosines(docs, folder)]


def _draw_cosines(docs: Path, folder: Path) -> list[Path]:
    """How the gradients of the two losses turn to each other, or away: a line an arm, mean over the final seeds."""
    from matplotlib import pyplot

    made = []
    for name, journal in journals(folder).items():
        found = {scenario: finals(journal, scenario) for scenario in SCENARIOS}
        found = {scenario: rows for scenario, rows in found.items() if BASE in rows}
        if not found:
            continue
        figure, grid = pyplot.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), sharey=True, squeeze=False)
        for axes, (scenario, rows) in zip(grid[0], found.items(), strict=True):
            for arm in ALIGNMENT:
                seen = [dict(row["cosines"]) for row in rows.get(arm, []) if "cosines" in row]
                steps = sorted(set(seen[0]).intersection(*seen[1:])) if seen else []
                middle = [sum(each[step] for each in seen) / len(seen) for step in steps]
                axes.plot(steps, middle, label=arm.removeprefix("align-"))
            axes.axhline(0, color="#9aa0a6", linewidth=0.5)
            axes.set(title=scenario, xlabel="step")
        grid[0][0].set(ylabel="cosine of the two gradients")
        grid[0][0].legend(fontsize=7)
        figure.tight_layout()
        path = docs / f"quality-cosines-{name}.png"
        figure.savefig(path, format="png", dpi=90, metadata={"Software": None})
        pyplot.close(figure)
        made.append(path)
    return made


def _signed(value: tuple[float, float]) -> str:
    middle, half = value
    return f"{middle:+.2f} ± {half:.2f}"
