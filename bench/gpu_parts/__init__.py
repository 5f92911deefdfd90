"""The parts of the GPU suite: one file a part, each with a `run(book, options)` that fills a book case by case."""

from __future__ import annotations

# name: (its share of the time, what it is about); in the order in which they run
PARTS: dict[str, tuple[float, str]] = {
    "environment": (0.05, "the machine and its ceilings"),
    "correctness": (0.27, "every operation and every step against the truth"),
    "kernels": (0.18, "vector operations against torch and a copy"),
    "step": (0.35, "whole steps against a plain two-loss step"),
    "end_to_end": (0.15, "unlearning to the same gap"),
}
