"""What has been done, one JSON line a task, appended as soon as it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Journal:
    """The rows of a file by key; a line that was cut off in the middle is no row, and its task is done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole)
            for line in whole.splitlines():
                row = json.loads(line)
                if row.get("anew"):
                    self.rows[row["key"]] = row
                self.rows.setdefault(row["key"], row)

    def add(self, row: Row, anew: bool = False) -> None:
        """Write a row down; with `anew` it takes the place of another of its key, which stays in the file.

        Raises:
            ValueError: there is one of that key, and it was not said to be made anew: nothing is judged twice.
        """
        if row["key"] in self.rows:
            if not anew:
                raise ValueError(f"{row['key']} is in the journal already")
            row = row | {"anew": True}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row

    def __contains__(self, key: str) -> bool:
        return key in self.rows
