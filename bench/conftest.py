"""`--record NAME` keeps what was measured in bench/results/cpu-NAME.json, or gpu-NAME.json where there is one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlur

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="NAME", help="write the figures to bench/results/{cpu,gpu}-NAME.json")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows of figures; written at the end if they are to be kept and nothing failed: a wrong step has no figure."""
    rows: list[dict[str, Any]] = []
    measured_on = machine()  # before the run, which is what the figures belong to
    yield rows
    name = request.config.getoption("--record")
    if name and rows and not request.session.testsfailed:
        RESULTS.mkdir(exist_ok=True)
        kind = "gpu" if torch.cuda.is_available() else "cpu"
        (RESULTS / f"{kind}-{name}.json").write_text(dumped(measured_on, rows))


def dumped(measured_on: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The text of a result: the machine, then one row a line."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    return f'{{\n "machine": {json.dumps(measured_on)},\n "rows": [\n  {lines}\n ]\n}}\n'


def machine() -> dict[str, Any]:
    """What the figures are measured on; `dirty` says that the commit alone does not describe the code."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastlur": fastlur.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
