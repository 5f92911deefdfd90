"""The picture of what steps cost: time against memory, one dot a method."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
CASE = {"model": "resnet18", "batch": 64, "precision": "fp32", "memory_format": None}


def draw(path: Path = ROOT / "docs" / "cost.png", machine: str = "cpu") -> bool:
    """Write the picture as PNG; False where the results are not there."""
    found = {}
    for kind in ("step", "memory"):
        rows = [
            row
            for file in sorted(RESULTS.glob(f"{machine}-*{kind}.json"))
            for row in json.loads(file.read_text())["rows"]
        ]
        found[kind] = next(
            (row for row in rows if all(row.get(key, value) == value for key, value in CASE.items())), None
        )
    if None in found.values():
        return False
    times, held = found["step"]["ratio_to_bare"], found["memory"]
    arms = {"bare": (1.0, 1.0, 1.0)} | times

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name, (middle, low, high) in arms.items():
        if name in held["extra"]:
            ours = name.split(",")[0] in ("optimistic", "secant", "first_order", "exact")
            colour = "#1a73e8" if ours else "#9aa0a6"
            spread = [[middle - min(low, middle)], [max(high, middle) - middle]]
            axes.errorbar(middle, held["extra"][name], xerr=spread, fmt="o", color=colour, capsize=2)
            axes.annotate(name, (middle, held["extra"][name]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="time of a step ÷ a plain two-loss step", ylabel="peak memory, MiB")
    axes.set_title("ResNet-18, 64 + 64 images, float32; memory beyond the parameters")
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True
