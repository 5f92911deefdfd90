"""The benchmark of the operations can be believed: every arm is checked, every row is whole, every result is told."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import operations
import pytest
import report
import spellings
import torch
import traffic
from kernel_cases import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from fastlur import backends

BENCH = Path(operations.__file__).parent
SMALL = [(7,), (3, 5), (1,)]
# torch's own compiler imports deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
every_operation = pytest.mark.parametrize("name", spellings.OPERATIONS)


def arms(name, sets=1):
    held = [operations.vectors(SMALL, seed) for seed in range(sets)]
    return operations.arms_of(name, held, "extension", full=True, compiler="eager"), held


@every_operation
def test_every_spelling_computes_what_the_operation_does(name):
    made, held = arms(name)
    operations.check(name, SMALL, made, held[0])


class Counted(TorchDispatchMode):
    """Counts sums of two tensors by calls of their own; what _foreach adds up is not among them."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.name().startswith("aten::add.")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_on_a_gpu_an_optimizer_is_given_its_gradients_at_once(kind, how):
    made = {}
    for count in (3, 30):
        v = [[torch.rand(5, device=DEVICE) for _ in range(count)] for _ in range(5)]
        steps = [torch.zeros((), device=DEVICE if how == "fused" else "cpu") for _ in range(count)]
        moments = {"step": steps, "exp_avg": v[3], "exp_avg_sq": v[4]}
        state = {"momentum_buffer": v[3]} if kind is torch.optim.SGD else moments
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        arm = spellings._optimizer(kind, v, state, on_gpu=True, **options, **{how: True})
        arm()
        expected = [a + u for a, u in zip(v[0], v[1], strict=True)]
        optimizer = next(c.cell_contents for c in arm.__closure__ if isinstance(c.cell_contents, torch.optim.Optimizer))
        if kind is torch.optim.AdamW:
            found = [p.grad for p in optimizer.param_groups[0]["params"]]
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        with Counted() as mode:
            arm()
        made[count] = mode.calls
    assert made[3] == made[30]


@every_operation
@pytest.mark.parametrize("place", ["what is written", "what is returned", "what is only read"])
def test_an_arm_that_is_wrong_is_found_whichever_it_is(name, place):
    made, held = arms(name)
    which = {"what is written": 2, "what is only read": 0}
    if name in ("grad_dot", "project"):
        which["what is written"] = 1
    for how in made:
        right = made[how][0]

        def wrong(right=right):
            result = right()
            if place == "what is returned":
                if result is None:
                    return torch.ones(())
                return tuple(1.01 * x for x in result) if isinstance(result, tuple | list) else 1.01 * result
            held[0][which[place]][1].view(-1)[3] += 1e-3
            return result

        with pytest.raises(AssertionError, match=re.escape(how)):
            operations.check(name, SMALL, {how: [wrong]}, held[0])
    too_many = [torch.ones(())] * 3
    with pytest.raises(AssertionError, match="another number of tensors"):
        operations.check(name, SMALL, {"torch: dot": [lambda: too_many]}, held[0])


@every_operation
def test_an_arm_goes_round_buffers_of_its_own(name):
    """On a GPU, one buffer would stay in the cache."""
    made, held = arms(name, sets=2)
    assert all(len(each) == 2 for each in made.values())
    for each in made.values():
        for v, arm, other in ((held[0], each[0], held[1]), (held[1], each[1], held[0])):
            before = [x.clone() for vector in other for x in vector]
            arm()
            assert all(torch.equal(x, y) for x, y in zip((x for vector in other for x in vector), before, strict=True))
            assert all(bool(x.isfinite().all()) for vector in v for x in vector)
    turn = []
    arm = operations.rotating([lambda: turn.append(0), lambda: turn.append(1)])
    for _ in range(5):
        arm()
    assert turn == [0, 1, 0, 1, 0]


def test_copies_go_round_buffers_of_their_own():
    sources = [torch.full((3,), float(k), device=DEVICE) for k in range(4)]
    pairs = iter([torch.stack([x, x + 10]) for x in sources])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: next(pairs))
        made = operations.copies(3, 4)
    assert len(made) == 4
    assert [arm().tolist() for arm in made] == [x.tolist() for x in sources]


def test_the_names_of_the_arms_are_those_of_the_spellings():
    for name in spellings.OPERATIONS:
        made, _ = arms(name)
        own = spellings.eager(name, operations.vectors(SMALL, 0))
        assert set(made) == {"ours", "plain", "torch: compiled", *(f"torch: {how}" for how in own)}
        assert ("foreach" in own) == (name in traffic.FOREACH_TRAFFIC)
        assert len(own) > 1 or name in ("threshold", "step_control")
        assert set(operations.names("torch", name, False)) == set(made) - {"plain", "torch: compiled"}


def whole(rows, full, gpu) -> None:
    """Every operation and layout once, each row with all its arms and figures."""
    seen = [(row["operation"], row["layout"]) for row in rows]
    assert sorted(seen) == sorted(operations.cases(full, gpu))
    for row in rows:
        wanted = {"copy", *operations.names(row["backend"], row["operation"], full)}
        assert set(row["seconds"]) == set(row["quartiles"]) == wanted, (row["operation"], row["layout"])
        for how, (low, high) in row["quartiles"].items():
            assert low <= row["seconds"][how] <= high
        best = row["seconds"][f"torch: {row['best_torch']}"]
        assert best == min(spent for how, spent in row["seconds"].items() if how.startswith("torch: "))


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*-ops.json")), ids=lambda path: path.stem)
def test_a_committed_result_is_whole(path):
    kept = json.loads(path.read_text())
    gpu = kept["machine"]["gpu"]
    assert path.stem.startswith("gpu" if gpu else "cpu")
    assert {"operation", "layout", "backend", "seconds", "gigabytes_per_second"} <= set(kept["rows"][0])
    whole(kept["rows"], True, bool(gpu))


def rows(full=False) -> list[dict]:
    return [
        operations.measured(name, layout, SMALL, full, 0.0, "eager") for name, layout in operations.cases(full, False)
    ]


def test_what_is_measured_now_is_whole():
    found = rows()
    whole(found, False, False)
    for spoil in (
        lambda r: r.pop(),
        lambda r: r[3]["seconds"].pop("copy"),
        lambda r: r[0]["seconds"].pop("torch: foreach"),
    ):
        worse = json.loads(json.dumps(found))
        spoil(worse)
        with pytest.raises((AssertionError, KeyError)):
            whole(worse, False, False)


def test_what_is_measured_now_fills_the_table(tmp_path, monkeypatch):
    made = {"cpu": "a CPU", "threads": 2, "gpu": None, "torch": "2.13"}
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    row = rows()[0] | {"times_as_fast_as_best_torch": 0.5, "quartiles_of_that": [0.4, 0.6], "best_torch": "dot"}
    row |= {"times_as_fast_as_foreach": 3.0, "gigabytes_per_second": 30.0, "copy_gigabytes_per_second": 40.0}
    there = row | {"layout": "1e6 flat", "times_as_fast_as_foreach": 1.5}
    alone = row | {"operation": "step_control", "layout": "scalars", "times_as_fast_as_foreach": None}
    (tmp_path / "bench" / "results" / "cpu-ops.json").write_text(
        json.dumps({"machine": made, "rows": [row, there, alone]})
    )
    text = report.operations()
    assert "| `grad_dot` | 0.50 [0.40–0.60] (dot) / 3.00 | 0.50 [0.40–0.60] (dot) / 1.50 |" in text
    assert "| `grad_dot` | 30.0 (75 %) | 30.0 (75 %) |" in text
    assert "slower than the best torch spelling: `grad_dot` 0.50 at 1e6 flat (dot)." in text
    assert "although passes are fused: `grad_dot` 1.50 at 1e6 flat (by bytes at most 3)." in text
    assert "`step_control`, on scalars only: 0.50 times as fast" in text and "scalars |" not in text


@pytest.mark.parametrize(("gpu", "name"), [(None, "cpu-ops"), ("NVIDIA H100", "gpu-ops")])
def test_a_result_is_named_by_what_it_was_measured_on(gpu, name):
    """`make bench-full` on a GPU must not write over the figures of a CPU."""
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert "benchmark-only -s --record $$part" in (BENCH.parent / "Makefile").read_text()
    assert conftest.named("ops", {"gpu": gpu}) == name


def test_the_plain_arm_is_served_by_plain_torch():
    seen = []
    operations.plain(lambda: seen.append(backends.serving(DEVICE)))()
    assert seen == ["torch"]
