"""`--record NAME` keeps what was measured in bench/results/cpu-NAME.json, or gpu-NAME.json where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import dumped, machine

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
        (RESULTS / f"{named(name, measured_on)}.json").write_text(dumped(measured_on, rows))


def named(name: str, measured_on: dict[str, Any]) -> str:
    """The name of a result with what it was measured on: a GPU's never replaces a CPU's."""
    return f"{'gpu' if measured_on['gpu'] else 'cpu'}-{name}"
