"""What info() says that a backend has been through is what the committed results show, no more and no less."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fastlur
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


def test_what_the_tests_run_on_every_cpu_is_called_tested():
    """.ci/run has both: the plain backend everywhere, the extension where it builds it."""
    assert {name: said for (name, where), said in backends.CHECKED.items() if where == "cpu"} == {
        "torch": "tested",
        "extension": "tested",
    }


@pytest.mark.parametrize("name", ["triton", "extension"])
def test_the_readme_says_it_too(name):
    readme = (RESULTS.parent.parent / "README.md").read_text()
    assert (UNMEASURED[name] in readme) == (backends.CHECKED[name, "cuda"] == UNMEASURED[name])


@pytest.mark.parametrize("forced", [None, "torch", "triton"])
def test_info_says_it_with_a_gpu_or_without_whoever_serves(forced, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with nullcontext() if forced is None else backends.backend(forced):
        told = fastlur.info()["operations"]
    for entry in told.values():
        for where in ("cpu", "cuda"):
            names = {name for name, device in backends.CHECKED if device == where}
            assert entry[where]["checked"] == {name: backends.CHECKED[name, where] for name in names}
    assert {"interpreter only", "compiled only"} & set(told["displace"]["cuda"]["checked"].values()) == {
        said for said in backends.CHECKED.values() if said in ("interpreter only", "compiled only")
    }


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
