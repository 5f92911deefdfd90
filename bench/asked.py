"""What was asked of the package, what was measured, and whether that is enough: from the committed results of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tables import results

Triple = tuple[float, float, float]  # median, lower and upper quartile


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        what: in words.
        asked: the bound.
        found: what was measured, in words with its spread; None: not measured.
        held: whether it is enough; None: not measured.
    """

    what: str
    asked: str
    found: str | None
    held: bool | None

    def line(self) -> str:
        """The table's row."""
        verdict = {True: "held", False: "**missed**", None: ""}[self.held]
        return f"| {self.what} | {self.asked} | {self.found or 'not measured'} | {verdict} |"


def targets() -> str:
    """The table."""
    made = [*_steps(), *_opponent(), *_whole(), *_memory(), *_operations(), *_growth()]
    machines = {machine for kind in ("step", "ops", "memory", "whole") for machine, _ in _on_cpu(kind)}
    head = [f"{'; '.join(sorted(machines))}. Medians [middle half of the rounds]:", ""] if machines else []
    return "\n".join([*head, "| | asked | measured | |", "|---" * 4 + "|", *(each.line() for each in made)])


def most(what: str, bound: float, found: Triple | None) -> Target:
    """A target that is an upper bound."""
    said = None if found is None else "{:.2f} [{:.2f}, {:.2f}]".format(*found)
    return Target(what, f"≤ {bound:g}", said, None if found is None else found[0] <= bound)


def _steps() -> Iterator[Target]:
    rows = {
        row["batch"]: row["ratio_to_bare"]
        for row in _rows("step")
        if (row["model"], row["precision"], row["memory_format"]) == ("resnet18", "fp32", None)
    }
    for mode, bounds in (
        ("optimistic", {64: 1.02, 8: 1.05}),
        ("secant", {64: 1.53}),
        ("exact", {64: 2.1}),
    ):
        for items, bound in bounds.items():
            yield most(
                f"step of `{mode}` ÷ bare two-loss step, ResNet-18, {items} + {items}",
                bound,
                rows.get(items, {}).get(mode),
            )


def _opponent() -> Iterator[Target]:
    rows = {row["batch"]: row["optimistic_to"] for row in _rows("scissorhands")}
    for form, bound in (("as_published", 0.85), ("cleaned", 1.0)):
        said = form.replace("_", " ")
        for items in (64, 8):
            yield most(
                f"`optimistic` ÷ ScissorHands {said}, step in conflict, {items} + {items}",
                bound,
                rows.get(items, {}).get(form),
            )
    held = [row for row in _rows("memory") if row["model"] == "resnet18"]
    for form in ("as published", "cleaned"):
        for row in held:
            ratio = row["optimistic_to"].get(f"scissorhands, {form}", {}).get("in_steps")
            if ratio is not None:
                what = f"the same, peak memory beyond the parameters, {form}, {row['batch']} + {row['batch']}"
                yield Target(what, "≤ 0.7", f"{ratio:.2f}", ratio <= 0.7)


def _whole() -> Iterator[Target]:
    found = next((row["same_gap"] for row in _rows("whole") if "same_gap" in row), {})
    ratio = found.get("scissorhands, cleaned", {}).get("ratio", {}).get("lur, optimistic")
    said = None if not found else "never as near" if ratio is None else f"{ratio:.2f}"
    held = None if not found else ratio is not None and ratio <= 0.5
    yield Target("whole run of LUR to the gap that ScissorHands cleaned reached, digits", "≤ 0.5", said, held)


def _memory() -> Iterator[Target]:
    rows = _rows("memory")
    errors = [abs(error) for row in rows for error in row["error_of_peak"].values()]
    said = f"{max(errors):.1%} at worst of {len(errors)} cases" if errors else None
    yield Target("`estimate`: error of the predicted peak", "≤ 10 %", said, max(errors) <= 0.1 if errors else None)


def _operations() -> Iterator[Target]:
    rows = [row for row in _rows("ops") if row["layout"] not in ("1e5 flat", "scalars")]
    for key, bound, said in (
        ("times_as_fast_as_best_torch", 1.0, "the best torch spelling, compiled included"),
        ("times_as_fast_as_foreach", 2.0, "`_foreach`, where passes are fused"),
    ):
        fused = [row for row in rows if bound == 1 or row["operation"] not in ("project", "threshold")]
        figures = [row[key] for row in fused if row[key] is not None]
        enough = sum(figure >= bound for figure in figures)
        told = f"{enough} of {len(figures)} cases, least {min(figures):.2f}" if figures else None
        yield Target(
            f"operations of 1e6 elements and more, times as fast as {said}",
            f"≥ {bound:g}",
            told,
            enough == len(figures) if figures else None,
        )


def _growth() -> Iterator[Target]:
    rows = _rows("growth")
    per = [row["nanoseconds_a_parameter"] for row in rows if row["tensors"] == 62 and row["parameters"] >= 1_000_000]
    said = f"{min(per):.2f} to {max(per):.2f} ns a parameter" if per else None
    yield Target("vector work of a step from 1e6 to 1e8 parameters: linear", "flat", said, _flat(per))
    per = [row["nanoseconds_a_parameter"] for row in rows if row["parameters"] == 10_000_000]
    said = f"{min(per):.2f} to {max(per):.2f} ns a parameter" if per else None
    yield Target(
        "the same, 1e7 parameters in 1 to 1,000 tensors: independent of their number", "flat", said, _flat(per)
    )


def _flat(per: list[float]) -> bool | None:
    """Within a fourth of each other, which is what such a machine's clock can tell."""
    return max(per) <= 1.25 * min(per) if per else None


def growth() -> str:
    """What a step of `optimistic` takes beside its passes, from every `*-growth.json`."""
    lines: list[str] = []
    for machine, rows in results("growth"):
        lines += [
            f"{machine}:",
            "",
            "| parameters | tensors | ms beside the passes | ns a parameter |",
            "|---" * 4 + "|",
        ]
        for row in rows:
            spent = "{:.2f} [{:.2f}, {:.2f}]".format(*(1e3 * each for each in row["beside_the_passes_seconds"]))
            lines.append(
                f"| {row['parameters']:.0e} | {row['tensors']} | {spent} | {row['nanoseconds_a_parameter']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() or "Not measured."


def exact() -> str:
    """The exact gradient by every way, from every `*-exact.json`."""
    lines: list[str] = []
    for machine, rows in results("exact"):
        for row in rows:
            lines += [
                f"{machine}, {row['model']}, {row['batch']} + {row['batch']}, passes only, {row['rounds']} rounds:",
                "",
                "| | ÷ bare |",
                "|---|---|",
            ]
            ordered = sorted(row["ratio_to_bare"].items(), key=lambda each: each[1][0])
            lines += [f"| {how} | {'{:.2f} [{:.2f}, {:.2f}]'.format(*found)} |" for how, found in ordered]
            lines.append("")
    return "\n".join(lines).rstrip() or "Not measured."


def _rows(kind: str) -> list[dict[str, Any]]:
    """The rows of the CPU's results of that kind."""
    return [row for _, rows in _on_cpu(kind) for row in rows]


def _on_cpu(kind: str) -> list[tuple[str, list[dict[str, Any]]]]:
    return results(kind, "cpu-")
