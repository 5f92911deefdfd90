"""The history of a run, collected on the device and read by the host in bundles."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlur.stats import FIELDS, StepStats
from fastlur.step import READ_EVERY

COLUMNS = ("step", "lr", *FIELDS)


class History(dict[str, list[float]]):
    """Columns of numbers, one entry a step.

    Keys: "step" (from 1), "lr", "forget_loss" and "retain_loss" (nats for the default losses, unweighted), "cosine"
    (between the retaining and the forgetting half of the direction, in [−1, 1]), "forget_norm" and "retain_norm" (of
    those halves, the forget weight included). It is a plain dict of lists: `json.dumps`, pandas and matplotlib take it.
    """

    def __init__(self) -> None:
        super().__init__({column: [] for column in COLUMNS})
        self._waiting: list[tuple[int, float, Tensor]] = []

    def add(self, stats: StepStats, lr: float) -> bool:
        """Take a step's statistics; True when this brought new rows to the host."""
        self._waiting.append((stats.step, lr, stats.numbers()))
        if stats.dots.device.type != "cpu" and len(self._waiting) < READ_EVERY:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Bring what is still on the device to the host."""
        if not self._waiting:
            return
        for (step, lr, _), row in zip(
            self._waiting, torch.stack([numbers for *_, numbers in self._waiting]).tolist(), strict=True
        ):
            for column, value in zip(COLUMNS, (step, lr, *row), strict=True):
                self[column].append(value)
        self._waiting = []

    def columns(self) -> dict[str, list[float]]:
        """A plain copy, everything on the host."""
        self.flush()
        return {column: list(values) for column, values in self.items()}

    def restore(self, columns: dict[str, list[float]]) -> None:
        """Go on from a copy.

        Raises:
            ValueError: it is none.
        """
        found = {column: [float(value) for value in columns[column]] for column in COLUMNS}
        if len({len(values) for values in found.values()}) != 1:
            raise ValueError("the columns of the history are of different lengths")
        found["step"] = [int(value) for value in found["step"]]
        self.update(found)
