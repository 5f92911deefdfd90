"""The picture of a demo run: how the losses and the cosine went, and the table's figures as bars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlur.demo import TITLES, Outcome, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = ("ua", "ra", "ta", "mia", "gap")
COLOURS = {"before": "#9aa0a6", "after unlearning": "#1a73e8", "retrained (truth)": "#188038"}


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Write the picture as PNG, whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(outcomes), 3, figsize=(14, 3.6 * len(outcomes)), squeeze=False)
    for line, outcome in zip(grid, outcomes, strict=True):
        _losses(line[0], outcome)
        _cosine(line[1], outcome)
        _bars(line[2], outcome)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    temporary.replace(path)


def _losses(axes: Axes, outcome: Outcome) -> None:
    history = outcome.result.history
    axes.plot(history["step"], history["retain_loss"], color="#188038", label="retain loss")
    axes.plot(history["step"], [-v for v in history["forget_loss"]], color="#d93025", label="forget cross-entropy")
    axes.set_yscale("log")
    axes.set_title(f"forget {TITLES[outcome.scenario]}")
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    axes.legend()


def _cosine(axes: Axes, outcome: Outcome) -> None:
    history = outcome.result.history
    axes.axhline(0, color="#9aa0a6", linewidth=0.8)
    axes.plot(history["step"], history["cosine"], color="#1a73e8")
    axes.set_ylim(-1, 1)
    axes.set_title("cosine between the two gradients")
    axes.set_xlabel("step")


def _bars(axes: Axes, outcome: Outcome) -> None:
    width = 0.27
    for place, (label, figures, _) in enumerate(rows(outcome)):
        heights: list[Any] = [getattr(figures, name) or 0.0 for name in FIGURES]
        x = [i + (place - 1) * width for i in range(len(FIGURES))]
        bars = axes.bar(x, heights, width, label=label, color=COLOURS[label])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(FIGURES)), [name.upper() if name != "gap" else "gap" for name in FIGURES])
    axes.set_ylim(0, 118)
    axes.set_title("percent (gap: points)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3, fontsize=8, frameon=False)
