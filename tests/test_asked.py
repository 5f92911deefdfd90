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


def step(items, spread=0.01, **ratios):
    fixed = {"model": "resnet18", "batch": items, "precision": "fp32", "memory_format": None}
    return fixed | {"ratio_to_bare": {mode: [x, x - spread, x + spread] for mode, x in ratios.items()}}


def test_without_results_nothing_is_held_or_missed(results):
    assert len(lines()) > 10
    assert all("not measured |  |" in line for line in lines())


def test_a_bound_is_held_or_missed_where_the_middle_half_is_on_one_side(results):
    results("cpu-a-step", step(64, optimistic=1.0, secant=1.55, exact=2.0))
    results("cpu-b-step", step(8, spread=0.1, optimistic=1.04))
    found = [line for line in lines() if line.startswith("| step of")]
    assert [line.split("|")[4].strip() for line in found] == ["held", "undecided", "", "", "**missed**", "held"]
    assert "1.04 [0.94, 1.14]" in found[1]


def test_of_two_measurements_of_a_step_the_dearer_one_counts(results):
    results("cpu-a-step", step(64, optimistic=1.0))
    ratios = {"LUR, optimistic": [1.1, 1.05, 1.2]}
    results("cpu-scissorhands", {"batch": 64, "ratio_to_bare": ratios, "optimistic_to": {}})
    found = next(line for line in lines() if line.startswith("| step of `optimistic` ÷"))
    assert "1.10 [1.05, 1.20]" in found
    assert "**missed**" in found


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
    def row(parameters, tensors, seconds):
        spent = {"beside_them_seconds": [seconds] * 3, "nanoseconds_a_parameter": 1e9 * seconds / parameters}
        return {"parameters": parameters, "tensors": tensors} | spent

    rows = [row(10**6, 62, 1e-3), row(10**8, 62, 0.2), row(10**7, 1, 0.02), row(10**7, 1000, 0.025)]
    results("cpu-growth", *rows, row(10**5, 1, 1e-3), row(10**5, 1000, 1e-2))
    linear, large, small = (
        line for line in lines() if "GPU" not in line and ("| linear |" in line or "| flat |" in line)
    )
    assert "1.00 at 1e+06, 2.00 at 1e+08 | **missed**" in linear
    assert "20.0 in 1, 25.0 in 1,000 | held" in large
    assert "1.0 in 1, 10.0 in 1,000 | **missed**" in small


def test_a_case_that_stands_in_two_results_is_refused(results):
    results("cpu-a-step", step(8, optimistic=1.0))
    results("cpu-b-step", step(64, optimistic=1.0))
    lines()
    results("cpu-c-step", step(8, optimistic=1.1))
    with pytest.raises(SystemExit, match=r"cpu-c-step\.json has again"):
        lines()


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([0.8, 1.2], [4.0, 4.0], "0.25 [0.20, 0.30] | held"),
        ([3.0, 3.0], [2.0, 4.0], "1.00 [0.75, 1.50] | **missed**"),
        ([1.0, 3.0], [4.0, 4.0], "0.50 [0.25, 0.75] | undecided"),
        (None, [4.0], "only ScissorHands comes as near: no ratio |  |"),
        ([1.0], None, "only LUR comes as near: no ratio |  |"),
        (None, None, "neither comes as near: no ratio |  |"),
    ],
)
def test_whole_runs(results, ours, theirs, said):
    """Ratios of means over seeds, with those of single seeds."""
    each = {asked.LUR: ours, asked.CLEANED: theirs}
    seconds = {arm: spent and sum(spent) / len(spent) for arm, spent in each.items()}
    results("cpu-whole", {"to_the_gap": {"fixed, 2": {"gap": 2.0, "seconds": seconds, "each": each}}})
    (line,) = [each for each in lines() if "whole run of LUR ÷ ScissorHands cleaned, to" in each]
    assert said in line


def test_a_step_that_nobody_has_looked_at_has_no_figure(results):
    row = step(8, optimistic=1.11, secant=1.55, joint=1.03) | {"alignment_cosine": {"secant": 0.99}, "rounds": 4}
    results("cpu-a-step", row)
    line = next(each for each in tables.steps().splitlines() if each.startswith("| resnet18"))
    assert "1.11" not in line
    assert "| 1.55 | 1.03 |" in line


def test_what_a_user_gets_is_asked_for_as_well(results):
    found = {"cleaned": [1.3, 1.25, 1.35], "as_published": [0.8, 0.7, 0.84]}
    results("cpu-scissorhands", {"batch": 64, "ratio_to_bare": {}, "optimistic_to": {}, "as_it_comes_to": found})
    mine = [line for line in lines() if line.startswith("| `optimistic, as it comes`")]
    assert ["**missed**" in line for line in mine] == [False, True]
    assert ["held" in line for line in mine] == [True, False]


@pytest.mark.parametrize(("extra", "verdict"), [(60.3, "held"), (60.7, "**missed**")])
def test_memory_is_held_against_a_vector_as_well_as_resident_memory_tells(results, extra, verdict):
    row = {"model": "resnet18", "batch": 8, "parameters": 40.0, "error_of_peak": {"optimistic": -0.101, "joint": 0.01}}
    steps = {"optimistic": extra, "joint": 20.0, "scissorhands, cleaned": 50.0, asked.AS_IT_COMES: 100.0}
    results("cpu-memory", row | {"extra_in_steps": steps, "vectors_accounted": {}})
    found = {line.split("|")[1].strip(): line for line in lines() if "emory" in line or "estimate" in line}
    mine = next(line for what, line in found.items() if what.startswith("memory of `optimistic` beyond"))
    assert f"{(extra - 20) / 40:.2f} at most of 1 cases | {verdict} |" in mine
    assert "2.00 at most of 1 cases | **missed** |" in next(line for what, line in found.items() if "novice" in what)
    assert "10.1% at worst of 2 cases | **missed** |" in found["`estimate`: error of the predicted peak"]
    assert any("ScissorHands cleaned, peak memory" in what and "1.2" in line for what, line in found.items())
