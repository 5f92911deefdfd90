"""The table at the end, from the files alone: what was found, what was skipped, what went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Part = dict[str, Any]


def table(out: Path, parts: Iterable[str]) -> str:
    """All parts' figures as Markdown; figures without a GPU's name are said to be none of a GPU."""
    kept = {name: json.loads((out / f"{name}.json").read_text()) for name in parts if (out / f"{name}.json").exists()}
    lines = [heading(kept)]
    for name in parts:
        lines += ["", f"## {name.replace('_', ' ')}", ""]
        if name not in kept:
            lines.append("Not run.")
            continue
        part = kept[name]
        if (here := measured_on(part)) not in (None, measured_on(first(kept))):
            lines += [f"Measured on {here}", ""]
        lines += SHOWN[name]([case for case in part["cases"] if case["status"] == "done" or "seconds" in case])
        lines += troubles(part)
    return "\n".join(lines)


def first(kept: dict[str, Part]) -> Part | None:
    """The first part that says where it ran; one that died at once does not."""
    return next((part for part in kept.values() if part["machine"]), None)


def measured_on(part: Part | None) -> str | None:
    """The device, the versions, the commit and the day of a part; None where it does not know."""
    if part is None or not part["machine"]:
        return None
    machine = part["machine"]
    commit = f"{machine.get('commit') or 'unknown'}{', changed since' if machine.get('dirty') else ''}"
    return f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, commit {commit}, {part['date']}"


def heading(kept: dict[str, Part]) -> str:
    """Where and when; or that these are no figures of a GPU."""
    part = first(kept)
    if part is None:
        return "# GPU suite: nothing was measured"
    if part["machine"]["gpu"] is None:
        return f"# GPU suite on a CPU: its plumbing was tested, no GPU was measured ({measured_on(part)})"
    small = ", tiny sizes: no figures" if any(each.get("tiny") for each in kept.values()) else ""
    return f"# {measured_on(part)}{small}"


def troubles(part: Part) -> list[str]:
    """What failed or was skipped, and whether the part came to its end."""
    lines = [f"- {each['status']}: {each['case']}: {each['why']}" for each in part["cases"] if each["status"] != "done"]
    for case in part["cases"]:
        lines += [f"- dropped: {case['case']}: {arm}: {why}" for arm, why in case.get("dropped", {}).items()]
    if not part["complete"]:
        lines.append("- cut off: the cases after these are missing")
    if "fault" in part:
        lines.append(f"- fault: {part['fault']}{': ' + part['stderr'][-1] if part.get('stderr') else ''}")
    return ["", *lines] if lines else []


def environment(cases: list[Part]) -> list[str]:
    lines = []
    for case in cases:
        if "packages" in case:
            versions = ", ".join(f"{name} {version}" for name, version in case["packages"].items() if version)
            lines.append(f"- Python {case['python']}, CUDA {case['cuda']}, {versions}; nvcc {case['nvcc']}")
        if case.get("nvidia_smi"):
            lines.append(f"- {case['case']}: " + ", ".join(f"{k} {v}" for k, v in case["nvidia_smi"].items()))
        if "gigabytes_per_second" in case:
            lines.append(f"- copy: {case['gigabytes_per_second']} GB/s, read and written")
        if "teraflops" in case:
            lines.append(f"- {case['case']}, {case['side']}: {case['teraflops']} TFLOP/s")
    return lines


def correctness(cases: list[Part]) -> list[str]:
    lines = []
    for case in cases:
        if "outcome" in case:
            lines.append(f"- {case['case']}: {case['outcome']}{': ' + case['missing'] if case['missing'] else ''}")
        elif "passed" in case:
            skipped = sum(case["skipped"].values())
            lines.append(f"- {case['case']}: {case['passed']} passed, {skipped} skipped {list(case['skipped'])[:3]}")
        else:
            lines.append(f"- {case['case']}: passed")
    return lines


def kernels(cases: list[Part]) -> list[str]:
    lines = [
        "| operation, layout | backend | µs | GB/s | of copy | × best torch (which) | × foreach |",
        "|---" * 7 + "|",
    ]
    for case in (each for each in cases if "operation" in each):
        for backend, bandwidth in case.get("gigabytes_per_second", {}).items():
            best = case.get("times_as_fast_as_best_torch", {}).get(backend, "")
            foreach = case.get("times_as_fast_as_foreach", {}).get(backend, "")
            micro = 1e6 * case["seconds"][backend][0]
            one = ", ".join(how.removeprefix("torch: ") for how in case.get("one_buffer", []))
            named = case["case"] + (f" (on one buffer: {one})" if one else "")
            lines.append(
                f"| {named} | {backend} | {micro:.1f} | {bandwidth:.0f} | {case['of_copy'][backend]:.2f} "
                f"| {best} ({case.get('best_torch', '')}) | {foreach} |"
            )
    lines += ["", "| the vector work of a step | arm | µs | GB/s | launches |", "|---" * 5 + "|"]
    for case in (each for each in cases if "launches" in each and "gigabytes_per_second" in each):
        for arm, times in case["seconds"].items():
            launched = case["launches"].get(arm)
            lines.append(
                f"| {case['case'].partition(': ')[2]} | {arm} | {1e6 * times[0]:.1f} "
                f"| {case['gigabytes_per_second'][arm]:.0f} | {'' if launched is None else launched} |"
            )
    return lines


def step(cases: list[Part]) -> list[str]:
    lines = [
        "| model, batch, precision | arm | ms | ÷ bare [quartiles] | extra memory, copies of θ | cosine |",
        "|---" * 6 + "|",
    ]
    for case in (each for each in cases if "refused" in each):
        copies = 4 * case["parameters"]
        for arm, times in (case["seconds"] | case["refused"]).items():
            ratio = case["ratio_to_bare"].get(arm)
            shown = "1" if arm == "bare" else "refused" if ratio is None else "{:.3f} [{:.3f}, {:.3f}]".format(*ratio)
            peaks = {name: each["peak_bytes"] for name, each in case["memory"].items() if each}
            known = None not in (peaks.get(arm), peaks.get("bare"))
            extra = f"{(peaks[arm] - peaks['bare']) / copies:+.2f}" if known else ""
            cosine = case["alignment_cosine"].get(arm.split(",")[0], "")
            shown += " *" * (arm != "bare" and not interleaved(case, arm))
            lines.append(f"| {case['case']} | {arm} | {1e3 * times[0]:.2f} | {shown} | {extra} | {cosine} |")
    lines += ["", "\\* Not interleaved with the other arms: in turn with the plain step alone, or, ScissorHands as"]
    lines += ["published, which empties the memory cache in every step, alone after the others."]
    for case in cases:
        if "own" in case:
            lines += ["", f"- {case['case']}: launches {case['launches']}, our own {case['own']}"]
        if "captured" in case:
            lines.append(f"- {case['case']}: {case['captured']}, seconds {case.get('seconds')}")
    return lines


def interleaved(case: Part, arm: str) -> bool:
    """Whether an arm took turns with all the others."""
    return bool(case.get("side_by_side", True)) and not arm.startswith("scissorhands, as published")


def end_to_end(cases: list[Part]) -> list[str]:
    lines = ["| arm | epochs | lr × | seconds | UA | RA | TA | MIA | gap |", "|---" * 9 + "|"]
    for case in cases:
        named = {
            "before": case.get("before"),
            "retrained": case.get("retrained"),
            case.get("arm", ""): case.get("after"),
        }
        for name, found in named.items():
            if found:
                cells = " | ".join("" if found[key] is None else f"{found[key]:.2f}" for key in found)
                spent = case.get("seconds", case["retraining_seconds"] if name == "retrained" else "")
                lines.append(f"| {name} | {case.get('epochs', '')} | {case.get('rate', '')} | {spent} | {cells} |")
    for case in (each for each in cases if "to_the_gap" in each):
        for label, found in case["to_the_gap"].items():
            lines += ["", f"To a gap of {found['gap']} ({label}), seconds: {found['seconds']}"]
    return lines


SHOWN = {
    "environment": environment,
    "correctness": correctness,
    "kernels": kernels,
    "step": step,
    "end_to_end": end_to_end,
}
