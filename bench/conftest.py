"""`--record NAME` keeps what the benchmarks measured in bench/results/NAME.json, with the machine in it."""

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
    parser.addoption("--record", metavar="NAME", help="write the figures to bench/results/NAME.json")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows of figures; written at the end if they are to be kept."""
    rows: list[dict[str, Any]] = []
    yield rows
    name = request.config.getoption("--record")
    if name and rows:
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text + "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastlur": fastlur.__version__,
        "commit": commit.stdout.strip(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
