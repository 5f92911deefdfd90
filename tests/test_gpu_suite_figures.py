"""What gets a figure in the GPU suite and what does not, and that figures are taken as the table says."""

import contextlib
import warnings
from types import SimpleNamespace

import operations
import pytest
import torch
from gpu_parts import end_to_end, kernels, step, timing
from gpu_parts.book import Book
from gpu_parts.table import SHOWN, table

import fastlur
import fastlur.step
from fastlur import backends, capture

# torch's own compiler imports deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def measured_step(path, case=step.TINY[0]):
    book = Book(path / "step.json", "step", 100, tiny=True)
    row = book.case(str(case), 0, lambda row: step.measure(row, case, {}, book, True))
    return book, row


def test_a_mode_that_does_not_align_gets_no_ratio_and_fails_the_case(tmp_path, monkeypatch):
    monkeypatch.setattr(step.gate, "compared", lambda model, f, r, mode, *_, **__: 0.1 if mode == "exact" else 1.0)
    book, row = measured_step(tmp_path)
    assert row["status"] == "failed" and "exact: does not align" in row["why"]
    assert set(row["refused"]) == {"exact"} and "exact" not in row["ratio_to_bare"]
    assert "optimistic" in row["ratio_to_bare"] and "optimistic" in row["seconds"]
    assert not book.finish()
    shown = table(tmp_path, ["step"])
    assert "| exact |" in shown and "| refused |" in shown and "| optimistic |" in shown


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no kernel"), "failed"),
        (torch.OutOfMemoryError(""), "done"),
        (fastlur.ModelError("not twice"), "done"),
    ],
)
def test_an_arm_of_our_own_that_does_not_run_is_a_fault_unless_it_says_why(tmp_path, monkeypatch, error, status):
    whole = step.opened

    def opened(model, method, *given, **options):
        if getattr(method, "gradient", None) == "exact":
            raise error
        return whole(model, method, *given, **options)

    monkeypatch.setattr(step, "opened", opened)
    _, row = measured_step(tmp_path)
    assert row["status"] == status and type(error).__name__ in row["dropped"]["exact"]
    assert "optimistic" in row["ratio_to_bare"]


def test_triton_must_serve_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(backends, "unavailable", lambda name, _: "no compiler" if name == "triton" else None)
    row = Book(tmp_path / "k.json", "kernels", 100).case("Triton serves", 0, kernels.served)
    assert row["status"] == "failed" and "no compiler" in row["why"]


def test_a_whole_step_in_a_graph_is_recorded_by_the_step_itself(tmp_path, monkeypatch):
    counts = {"recorded": 0, "replayed": 0}

    def record(work):
        counts["recorded"] += 1

        def replay():
            counts["replayed"] += 1
            work()

        return replay

    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(fastlur.step, "check_capture", lambda *_: None)
    monkeypatch.setattr(step, "captured", lambda arm: arm)
    row = {}
    step.in_graphs(row, step.TINY[0], *step.prepared(step.TINY[0], {}), seconds=0.01)
    assert row["captured"] == {"bare": True, "optimistic": True} and "faults" not in row
    assert counts["recorded"] == 1 and counts["replayed"] > 3
    assert set(row["seconds"]) == {"bare", "bare, graph", "optimistic", "optimistic, graph"}


def test_spans_that_somebody_drew_are_no_launches(monkeypatch):
    class Event(SimpleNamespace):
        device_type, is_user_annotation = torch.autograd.DeviceType.CUDA, False

    events = [Event(name="a"), Event(name="a"), Event(name="Optimizer.step", is_user_annotation=True)]
    events += [Event(name="cudaDeviceSynchronize"), Event(name="on the host", device_type="CPU")]
    run = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr("torch.profiler.profile", lambda **_: contextlib.nullcontext(run))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.launches(lambda: None) == {"a": 2}


def test_kernels_of_both_backends_are_known_as_our_own():
    walk = "void fastlur::walk<float, fastlur::(anonymous namespace)::Update<float, false> >(fastlur::Table<3>"
    assert step.own(walk) and step.own("dot_kernel")
    assert not step.own("void at::native::vectorized_elementwise_kernel<4, at::native::update_kernel>")


@pytest.mark.parametrize("error", [RuntimeError("does not launch"), AssertionError("off by one")])
def test_an_operation_that_cannot_be_checked_is_wrong_and_the_others_are_measured(tmp_path, monkeypatch, error):
    whole = operations.check

    def check(name, shapes, arms, v):
        if "triton" in arms:
            raise error
        whole(name, shapes, arms, v)

    monkeypatch.setattr(operations, "check", check)
    book = Book(tmp_path / "kernels.json", "kernels", 100)
    row = book.case("sgd", 0, lambda row: kernels.one(row, "sgd", "three", [(3,)], 0.01))
    assert row["status"] == "failed" and str(error) in row["wrong"]["triton"] and "torch" in row["seconds"]


@pytest.mark.parametrize("name", ["displace", "sgd"])
def test_every_arm_goes_round_buffers_or_is_marked(tmp_path, monkeypatch, name):
    monkeypatch.setattr(kernels, "rounds", lambda size: 3)
    monkeypatch.setattr(kernels, "rotating", lambda arms: seen.append(len(arms)) or arms[0])
    book, seen = Book(tmp_path / "kernels.json", "kernels", 100), []
    given = {"layout": "three", "shapes": [(3,)], "seconds": 0.01}
    plain = book.case("plain", 0, lambda row: kernels.one(row, name, **given))
    assert plain["status"] == "done" and set(seen) == {3}
    seen.clear()
    tuned = book.case("tuned", 0, lambda row: kernels.tuned(row, name, **given, compiler="eager"))
    assert tuned["status"] == "done" and set(seen) == ({1, 3} if name == "sgd" else {3})
    assert tuned["one_buffer"] == ["torch: compiled foreach"] * (name == "sgd")
    assert ("on one buffer: compiled foreach" in table(tmp_path, ["kernels"])) == (name == "sgd")


def test_kernels_are_compared_with_float64(tmp_path, monkeypatch):

    def wrong(*_):
        raise AssertionError("off by one")

    monkeypatch.setattr(operations, "check", wrong)
    book = Book(tmp_path / "wrong.json", "kernels", 100)
    row = book.case("sgd", 0, lambda row: kernels.one(row, "sgd", "three", [(3,)], 0.01))
    assert row["status"] == "failed" and "off by one" in row["why"]
    assert row["gigabytes_per_second"] == {}


def test_arms_that_were_not_interleaved_are_marked():
    given = {"case": "m", "parameters": 1, "refused": {}, "memory": {}, "alignment_cosine": {}}
    arms = ["bare", "optimistic", step.PUBLISHED]
    given |= {"seconds": {arm: [1.0] * 3 for arm in arms}, "ratio_to_bare": {arm: [1.0] * 3 for arm in arms[1:]}}
    for together, marked in ((True, [step.PUBLISHED]), (False, arms[1:])):
        lines = SHOWN["step"]([given | {"side_by_side": together}])
        assert [arm for arm in arms if any(f"| {arm} |" in line and "*" in line for line in lines)] == marked


def test_where_no_setting_was_run_with_every_arm_nothing_is_compared(tmp_path):
    book = Book(tmp_path / "end.json", "end_to_end", 100)
    row = book.case("to the same gap", 0, lambda row: end_to_end.judge(row, []))
    assert (row["status"], row["why"]) == ("skipped", "no setting was run with every arm")


def test_end_to_end_float32_is_float32(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(end_to_end, "to_the_same_gap", lambda *_: seen.append(switches()))
    with timing.tf32(True):
        end_to_end.run(None, None)
        assert switches() == (True, True)
    assert seen == [(False, False)]


def switches():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
