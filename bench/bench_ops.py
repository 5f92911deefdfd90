"""Every vector operation against its best spelling in torch; with FASTLUR_BENCH_FULL=1 all sizes. See `operations`."""

from __future__ import annotations

import os
from typing import Any

import pytest
from operations import DEVICE, cases, layouts, measured, ours, vectors

FULL = os.environ.get("FASTLUR_BENCH_FULL") == "1"
SECONDS = 2.0 if FULL else 1.0
LAYOUTS = layouts(FULL, DEVICE.type == "cuda") | {"scalars": [(3,)]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler imports deprecated parts of torch
@pytest.mark.parametrize(("name", "layout"), cases(FULL, DEVICE.type == "cuda"))
def test_operation(name: str, layout: str, benchmark: Any, record: list[dict[str, Any]]) -> None:
    row = measured(name, layout, LAYOUTS[layout], FULL, SECONDS)
    record.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours(name, vectors(LAYOUTS[layout], 0)), rounds=3)
