"""What was asked of the package, what was measured, and whether that is enough: from the committed results of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tables
from arms import AS_IT_COMES, FORMS, PARTED
from tables import results
from whole import BOUNDED, CLEANED, CLEANED_BF16, LUR, LUR_BF16, NOVICE

Triple = tuple[float, float, float]  # median, lower and upper quartile
RESIDENT = 0.5  # MiB by which the same step's resident memory differs from run to run
LARGE = {"swin_t": "Swin-T at 224 px, 28 M parameters", "lm_100m": "A language model of 98 M parameters"}


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        what: in words.
        asked: the bound.
        found: what was measured, in words with its spread; None: not measured.
        held: whether it is enough; None: not measured, or undecided: the spread is on both sides of the bound.
        comparable: False: what was measured has no ratio to be held against the bound.
    """

    what: str
    asked: str
    found: str | None
    held: bool | None
    comparable: bool = True

    def line(self) -> str:
        """The table's row."""
        none = "undecided" if self.found and self.comparable else ""
        verdict = {True: "held", False: "**missed**", None: none}[self.held]
        return f"| {self.what} | {self.asked} | {self.found or 'not measured'} | {verdict} |"


ON_A_GPU = (
    Target("on a GPU: operations ÷ measured copy bandwidth, 1e8 and 1e9 elements", "≥ 0.9", None, None),
    Target(
        "on a GPU: operations, times as fast as `_foreach` and as the best of torch, 62 tensors", "≥ 3, ≥ 1", None, None
    ),
    Target("on a GPU: growth from 1e5 to 1e9 parameters", "linear", None, None),
    Target(
        "on a GPU: vectors of `optimistic` and `secant`, by `max_memory_allocated`: more than a joint loss",
        "≤ 1",
        None,
        None,
    ),
    Target("on a GPU: a step recorded as a graph, and Swin-T at 224 px in all four modes", "shown", None, None),
    Target("on a GPU: launches of the vector work of a step, however many tensors", "≤ 5", None, None),
    Target("on an H100: whole run of LUR ÷ ScissorHands as published, to the same gap", "≤ 0.2", None, None),
)


def targets() -> str:
    """The table."""
    made = [*_steps(), *_opponent(), *_whole(), *_memory(), *_operations(), *_growth()]
    made += () if any(tables.RESULTS.glob("gpu-*")) else ON_A_GPU  # else the README has them
    machines = {machine for kind in ("step", "ops", "memory", "whole") for machine, _ in _on_cpu(kind)}
    told = (
        "Medians [middle half of the rounds]; of a step that two runs have measured, the dearer; of whole runs, means "
        "[least and most of three seeds]:"
    )
    head = [f"{'; '.join(sorted(machines))}. {told}", ""] if machines else []
    return "\n".join([*head, "| | asked | measured | |", "|---" * 4 + "|", *(each.line() for each in made)])


def most(what: str, bound: float, found: Triple | None) -> Target:
    """A target that is an upper bound; decided where the middle half of the rounds is on one side of it."""
    if found is None:
        return Target(what, f"≤ {bound:g}", None, None)
    _, low, high = found
    held = True if high <= bound else False if low > bound else None
    return Target(what, f"≤ {bound:g}", "{:.2f} [{:.2f}, {:.2f}]".format(*found), held)


def _steps() -> Iterator[Target]:
    """Of two runs that have measured the same step, the one that makes it dearer counts."""
    measured: dict[tuple[int, str], list[Triple]] = {}
    for row in _rows("step"):
        if (row["model"], row["precision"], row["memory_format"]) == ("resnet18", "fp32", None):
            for arm, found in row["ratio_to_bare"].items():
                measured.setdefault((row["batch"], arm), []).append(found)
    for row in _rows("scissorhands"):
        for arm, found in row["ratio_to_bare"].items():
            measured.setdefault((row["batch"], arm.removeprefix("LUR, ")), []).append(found)
    for mode, said, bounds in (
        ("optimistic", "", {64: 1.02, 8: 1.05}),
        (AS_IT_COMES, " (lent statistics, a novice asked)", {64: 1.02, 8: 1.05}),
        ("secant", "", {64: 1.53}),
        ("exact", " (by autograd)", {64: 2.1}),
    ):
        for items, bound in bounds.items():
            yield most(
                f"step of `{mode}`{said} ÷ bare two-loss step, ResNet-18, {items} + {items}",
                bound,
                max(measured.get((items, mode), []), default=None),
            )


def _opponent() -> Iterator[Target]:
    rows = {row["batch"]: row["optimistic_to"] for row in _rows("scissorhands")}
    for form, bound in (("as_published", 0.85), ("cleaned", 1.0)):
        for items in (64, 8):
            yield most(
                f"`optimistic` ÷ ScissorHands {PARTED[form]}, step in conflict, {items} + {items}",
                bound,
                rows.get(items, {}).get(form),
            )
    whole = {row["batch"]: row["as_it_comes_to"] for row in _rows("scissorhands") if "as_it_comes_to" in row}
    for form, bound in (("as_published", 0.85), ("cleaned", 1.0)):
        for items in whole:
            what = f"`{AS_IT_COMES}` ÷ ScissorHands {PARTED[form]}, step in conflict, {items} + {items}"
            yield most(what, bound, whole[items][form])
    without = {row["batch"]: row.get("optimistic_to_without_collection") for row in _rows("scissorhands")}
    for items in (64, 8):
        if without.get(items) is not None:
            what = f"`optimistic` ÷ ScissorHands as published, had collecting garbage cost nothing, {items} + {items}"
            yield most(what, 0.85, without[items])
    held = [row for row in _rows("memory") if row["model"] == "resnet18"]
    for form in reversed(FORMS):
        said = form.replace("scissorhands,", "ScissorHands")
        for mode in ("optimistic", AS_IT_COMES):
            for row in held:
                steps = row["extra_in_steps"]
                if {mode, form} <= set(steps):
                    items, ratio = f"{row['batch']} + {row['batch']}", steps[mode] / steps[form]
                    what = f"`{mode}` ÷ {said}, peak memory beyond the parameters, {items}"
                    yield Target(what, "≤ 0.7", f"{ratio:.2f}", ratio <= 0.7)
        vectors = held[0]["vectors_accounted"] if held else {}
        if {"optimistic", form} <= set(vectors):
            ratio = vectors["optimistic"] / vectors[form]
            what = f"the same, vectors of a device alone, by the accounting: `optimistic` ÷ {said}"
            yield Target(what, "≤ 0.7", f"{ratio:.2f}", ratio <= 0.7)


def _whole() -> Iterator[Target]:
    """Ratios of means over seeds, with the least and the largest of a seed."""
    found: dict[str, Any] = next((row["to_the_gap"] for row in _rows("whole") if "to_the_gap" in row), {})
    pairs = (
        ("LUR ÷ ScissorHands cleaned", LUR, CLEANED),
        ("LUR ÷ ScissorHands cleaned, both in bf16 and channels_last", LUR_BF16, CLEANED_BF16),
        ("LUR ÷ ScissorHands cleaned, with LUR's loss", LUR, BOUNDED),
        ("LUR as it comes (with a novice) ÷ ScissorHands cleaned", NOVICE, CLEANED),
    )
    once = {each["gap"]: (label, each) for label, each in reversed(found.items())}  # both sides' best may be one
    for said, mine, other in pairs:
        for label, each in reversed(once.values()):
            what = f"whole run of {said}, to a gap of {each['gap']:.2g} ({label})"
            ours, theirs = (each["seconds"].get(arm) for arm in (mine, other))
            if ours is not None and theirs is not None:
                ratios = [a / b for a, b in zip(each["each"][mine], each["each"][other], strict=True)]
                yield most(what, 0.5, (ours / theirs, min(ratios), max(ratios)))
            else:
                one = "neither comes" if ours is theirs else f"only {'LUR' if theirs is None else 'ScissorHands'} comes"
                yield Target(what, "≤ 0.5", f"{one} as near: no ratio", None, comparable=False)
    if not found:
        yield Target("whole run of LUR ÷ ScissorHands cleaned, to the same gap", "≤ 0.5", None, None)


def _memory() -> Iterator[Target]:
    rows = _rows("memory")
    for mode, said_of_it in (
        ("optimistic", ""),
        ("secant", ""),
        (AS_IT_COMES, " (its novice and lent statistics too)"),
    ):
        # the joint loss among the arms holds the parameters, two gradients and the optimizer's state
        more = [
            (row["extra_in_steps"][mode] - row["extra_in_steps"]["joint"], row["parameters"])
            for row in rows
            if {mode, "joint"} <= set(row["extra_in_steps"])
        ]
        beyond = "beyond parameters, two gradients and optimizer state, in vectors: more than a joint loss"
        what = f"memory of `{mode}`{said_of_it} {beyond}"
        said = f"{max(extra / vector for extra, vector in more):.2f} at most of {len(more)} cases" if more else None
        held = all(extra <= vector + RESIDENT for extra, vector in more) if more else None
        yield Target(what, f"≤ 1, give or take {RESIDENT} MiB", said, held)
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
    rows = {(row["parameters"], row["tensors"]): row for row in _rows("growth")}
    sizes = [size for size in (10**5, 10**6, 10**7, 10**8) if (size, 62) in rows]
    per = [rows[size, 62]["nanoseconds_a_parameter"] for size in sizes]
    said = ", ".join(f"{each:.2f} at {size:.0e}" for size, each in zip(sizes, per, strict=True))
    yield Target("work beside the gradients, ns a parameter", "linear", said or None, _flat(per))
    for size in (10**7, 10**5):
        found = {tensors: 1e3 * row["beside_them_seconds"][0] for (n, tensors), row in rows.items() if n == size}
        said = ", ".join(f"{found[tensors]:.1f} in {tensors:,}" for tensors in sorted(found) if tensors != 62)
        yield Target(
            f"the same, ms, {size:.0e} parameters in so many tensors", "flat", said or None, _flat(list(found.values()))
        )


def _flat(per: list[float]) -> bool | None:
    """Within a half of each other, which is what such a machine's clock can tell."""
    return max(per) <= 1.5 * min(per) if per else None


def growth() -> str:
    """What a step of `optimistic` takes beside two plain backward passes, from every `*-growth.json`."""
    lines: list[str] = []
    for machine, rows in results("growth"):
        lines += [f"{machine}:", ""]
        lines += [
            "| parameters | tensors | ms beside the gradients | ns a parameter | the gradients, ms |",
            "|---" * 5 + "|",
        ]
        for row in rows:
            size, per = f"{row['parameters']:.0e}", f"{row['nanoseconds_a_parameter']:.2f}"
            spent = "{:.2f} [{:.2f}, {:.2f}]".format(*(1e3 * each for each in row["beside_them_seconds"]))
            lines.append(f"| {size} | {row['tensors']} | {spent} | {per} | {1e3 * row['gradients_seconds']:.2f} |")
        lines.append("")
    return "\n".join(lines).rstrip() or "Not measured."


def large() -> str:
    """Steps of large models, in seconds, from every `*-step.json` and `*-memory.json` of a CPU."""
    lines: list[str] = []
    held = {row["model"]: row for row in _rows("memory")}
    for row in (each for each in _rows("step") if each["model"] in LARGE):
        lines += [f"{LARGE[row['model']]}, {row['batch']} + {row['batch']} items, {row['rounds']} rounds:", ""]
        lines += ["| | seconds a step | ÷ bare | MiB beyond the parameters |", "|---" * 4 + "|"]
        extra, items = held.get(row["model"], {}).get("extra", {}), held.get(row["model"], {}).get("batch")
        of = "" if items in (None, row["batch"]) else f" ({items} + {items} items)"
        for arm, found in ({"bare": (1.0, 1.0, 1.0)} | row["ratio_to_bare"]).items():
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*found) if arm != "bare" else "1"
            memory = f"{extra[arm]:.0f}{of}" if arm in extra else "not measured"
            lines.append(f"| {arm} | {row['bare_seconds'] * found[0]:.2f} | {ratio} | {memory} |")
        lines.append("")
    machines = "; ".join(sorted({machine for machine, _ in _on_cpu("step")}))
    return "\n".join([f"{machines}.", "", *lines]).rstrip() if lines else "Not measured."


def cheaper() -> str:
    """Steps in other precisions, layouts and forms, from every `*-cheaper.json`."""
    lines: list[str] = []
    for machine, rows in results("cheaper"):
        heads = [f"ResNet-18, {row['items']} + {row['items']} ({row['rounds']} rounds)" for row in rows]
        lines += [f"{machine}, ÷ a plain two-loss step in float32:", "", f"| | {' | '.join(heads)} |"]
        lines += ["|---" * (len(rows) + 1) + "|"]
        for arm in rows[0]["ratio_to_bare"]:
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio_to_bare"][arm]) for row in rows]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
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
