"""What is said of the targets follows from the committed results, and says so where there are none."""

import json

import asked
import pytest
import tables

MADE = {"cpu": "a CPU", "threads": 2, "gpu": None, "torch": "2.13"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Write results into a folder of their own: results(name, rows, gpu)."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def write(name, *rows, gpu=None):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": MADE | {"gpu": gpu}, "rows": rows}))

    return write


def lines():
    return [each for each in asked.targets().splitlines() if each.startswith("|")][2:]


def step(items, **ratios):
    fixed = {"model": "resnet18", "batch": items, "precision": "fp32", "memory_format": None}
    return fixed | {"ratio_to_bare": {mode: [x, x - 0.1, x + 0.1] for mode, x in ratios.items()}}


def test_without_results_nothing_is_held_or_missed(results):
    assert len(lines()) > 10
    assert all("not measured |  |" in line for line in lines())


def test_a_bound_is_held_or_missed_by_the_median(results):
    results("cpu-a-step", step(64, optimistic=1.02, secant=1.54, exact=2.0))
    results("cpu-b-step", step(8, optimistic=1.06))
    found = [line for line in lines() if line.startswith("| step of")]
    assert [line.split("|")[4].strip() for line in found] == ["held", "**missed**", "**missed**", "held"]
    assert "1.06 [0.96, 1.16]" in found[1]


def test_figures_of_a_gpu_are_not_taken_for_those_of_a_cpu(results):
    results("gpu-a-step", step(64, optimistic=0.5), gpu="H100")
    assert all("not measured |  |" in line for line in lines())


def test_operations_are_counted(results):
    row = {
        "operation": "sgd",
        "layout": "1e6 flat",
        "times_as_fast_as_best_torch": 1.2,
        "times_as_fast_as_foreach": 2.5,
    }
    slow = row | {"times_as_fast_as_best_torch": 0.7}
    small = row | {"layout": "1e5 flat", "times_as_fast_as_best_torch": 0.1}
    results("cpu-ops", row, slow, small, row | {"operation": "threshold", "times_as_fast_as_foreach": None})
    found = [line for line in lines() if "operations" in line]
    assert "2 of 3 cases, least 0.70 | **missed**" in found[0]
    assert "2 of 2 cases, least 2.50 | held" in found[1]


def test_growth_is_flat_or_not(results):
    def row(parameters, tensors, per):
        return {"parameters": parameters, "tensors": tensors, "nanoseconds_a_parameter": per}

    results("cpu-growth", row(10**6, 62, 1.0), row(10**8, 62, 1.3), row(10**7, 1, 1.0), row(10**7, 1000, 1.1))
    assert ["held" in line for line in lines()[-2:]] == [False, True]


def test_a_whole_run_that_never_comes_as_near_is_missed(results):
    found = {"scissorhands, cleaned": {"ratio": {"lur, optimistic": None}}}
    results("cpu-whole", {"same_gap": found})
    (line,) = [each for each in lines() if "whole run" in each]
    assert "never as near | **missed**" in line
