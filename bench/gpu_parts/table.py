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
        lines += SHOWN[name]([case for case in part["cases"] if case["status"] == "done"])
        lines += troubles(part)
    return "\n".join(lines)


def heading(kept: dict[str, Part]) -> str:
    """Where and when; or that these are no figures of a GPU."""
    machine = next((part["machine"] for part in kept.values() if part["machine"]), None)
    if machine is None:
        return "# GPU suite: nothing was measured"
    date = next(part["date"] for part in kept.values() if part["machine"])
    if machine["gpu"] is None:
        return f"# GPU suite on a CPU: its plumbing was tested, no GPU was measured ({machine['cpu']}, {date})"
    small = ", tiny sizes: no figures" if any(part.get("tiny") for part in kept.values()) else ""
    return f"# {machine['gpu']}, torch {machine['torch']}, {date}{small}"


def troubles(part: Part) -> list[str]:
    """What failed or was skipped, and whether the part came to its end."""
    lines = [f"- {each['status']}: {each['case']}: {each['why']}" for each in part["cases"] if each["status"] != "done"]
    for case in part["cases"]:
        lines += [f"- dropped: {case['case']}: {arm}: {why}" for arm, why in case.get("dropped", {}).items()]
    if not part["complete"]:
        lines.append("- cut off: the cases after these are missing")
    if "fault" in part:
        lines.append(f"- fault: {part['fault']}")
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
        for backend, bandwidth in case["gigabytes_per_second"].items():
            best = case.get("times_as_fast_as_best_torch", {}).get(backend, "")
            foreach = case.get("times_as_fast_as_foreach", {}).get(backend, "")
            micro = 1e6 * case["seconds"][backend][0]
            lines.append(
                f"| {case['case']} | {backend} | {micro:.1f} | {bandwidth:.0f} | {case['of_copy'][backend]:.2f} "
                f"| {best} ({case.get('best_torch', '')}) | {foreach} |"
            )
    lines += ["", "| the vector work of a step | arm | µs | GB/s | launches |", "|---" * 5 + "|"]
    for case in (each for each in cases if "launches" in each):
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
    for case in (each for each in cases if "ratio_to_bare" in each):
        copies = 4 * case["parameters"]
        for arm, times in (case["seconds"] | case["refused"]).items():
            ratio = case["ratio_to_bare"].get(arm)
            shown = "1" if arm == "bare" else "refused" if ratio is None else "{:.3f} [{:.3f}, {:.3f}]".format(*ratio)
            peaks = {name: each["peak_bytes"] for name, each in case["memory"].items() if each}
            known = None not in (peaks.get(arm), peaks.get("bare"))
            extra = f"{(peaks[arm] - peaks['bare']) / copies:+.2f}" if known else ""
            cosine = case["alignment_cosine"].get(arm.split(",")[0], "")
            lines.append(f"| {case['case']} | {arm} | {1e3 * times[0]:.2f} | {shown} | {extra} | {cosine} |")
    for case in cases:
        if "own" in case:
            lines += ["", f"- {case['case']}: launches {case['launches']}, our own {case['own']}"]
        if "captured" in case:
            lines.append(f"- {case['case']}: {case['captured']}, seconds {case.get('seconds')}")
    return lines


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
