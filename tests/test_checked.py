"""What info() says that a backend has been through is what the committed results show, no more and no less."""

import json
from pathlib import Path

import pytest

from fastlur import backends

RESULTS = Path(__file__).parent.parent / "bench" / "results"
UNMEASURED = {"torch": "not measured on a GPU", "triton": "interpreter only", "extension": "compiled only"}


def measured_on_a_gpu(folder):
    """The backends that some committed result from a machine with a GPU was served by."""
    found = set()
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and result.get("machine", {}).get("gpu"):
            found |= {row["backend"] for row in result.get("rows", []) if "backend" in row}
    return found


def untrue(checked, folder):
    """The entries for CUDA that the results in the folder do not bear out."""
    measured = measured_on_a_gpu(folder)
    return {name for name, said in UNMEASURED.items() if (checked[name, "cuda"] == said) == (name in measured)}


def test_what_is_said_is_what_was_measured():
    assert not untrue(backends.CHECKED, RESULTS)


@pytest.mark.parametrize("gpu", [None, "NVIDIA H100"])
def test_a_result_and_what_is_said_of_it_come_together(gpu, tmp_path):
    rows = [{"operation": "displace", "backend": "triton"}, {"operation": "a step"}]
    (tmp_path / "ops.json").write_text(json.dumps({"machine": {"gpu": gpu}, "rows": rows}))
    modest = {(name, "cuda"): said for name, said in UNMEASURED.items()}
    proud = modest | {("triton", "cuda"): "measured"}
    boastful = proud | {("extension", "cuda"): "measured"}
    assert untrue(modest, tmp_path) == ({"triton"} if gpu else set())
    assert untrue(proud, tmp_path) == (set() if gpu else {"triton"})
    assert untrue(boastful, tmp_path) == ({"extension"} if gpu else {"triton", "extension"})
