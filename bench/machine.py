"""What figures are measured on, and how a result is written: the machine first, then one row a line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastlur


def dumped(measured_on: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The text of a result: the machine, then one row a line."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    return f'{{\n "machine": {json.dumps(measured_on)},\n "rows": [\n  {lines}\n ]\n}}\n'


def machine() -> dict[str, Any]:
    """What the figures are measured on; `dirty` says that the commit alone does not describe the code.

    Results that were recorded a moment ago are no code.

    A copy of the files without their history takes the commit from FASTLUR_COMMIT.
    """
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastlur": fastlur.__version__,
        "commit": _git("rev-parse", "--short", "HEAD") or os.environ.get("FASTLUR_COMMIT", ""),
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,glob)**/results/**")
        ),
    }


@cache
def commit() -> str:
    """Of the code that runs, with a "+" where there is more to it than was committed."""
    on = machine()
    return on["commit"] + "+" * on["dirty"]


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
