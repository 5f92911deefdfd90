"""The plumbing of the GPU suite, at sizes a CPU does in seconds: what it writes, and what when things go wrong."""

import json
import subprocess
import sys

import gpu
import pytest
import report
import take
import torch
from gpu_parts import PARTS
from gpu_parts.book import Book, Options
from gpu_parts.table import table

STATES = {"done", "skipped", "failed", "out of memory"}

# torch's own compiler imports deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every part at its tiny size, in this process."""
    out = tmp_path_factory.mktemp("results")
    return out, {part: gpu.alone(part, out, 300, Options(tiny=True)) for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_and_writes_its_results(results, part):
    out, fine = results
    kept = json.loads((out / f"{part}.json").read_text())
    assert fine[part], [case for case in kept["cases"] if case["status"] == "failed"]
    assert kept["part"] == part and kept["complete"] and kept["tiny"]
    assert {case["status"] for case in kept["cases"]} <= STATES
    assert sum(case["status"] == "done" for case in kept["cases"]) >= 1
    assert all("dropped" not in case for case in kept["cases"])


def test_nothing_of_a_tiny_run_is_called_a_figure_of_a_gpu(results):
    out, _ = results
    text = table(out, PARTS)
    if torch.cuda.is_available():
        assert "tiny sizes: no figures" in text.splitlines()[0]
        return
    assert "no GPU was measured" in text.splitlines()[0]
    for part in PARTS:
        kept = json.loads((out / f"{part}.json").read_text())
        assert kept["machine"]["gpu"] is None
    steps = next(case for case in json.loads((out / "step.json").read_text())["cases"] if "memory" in case)
    assert set(steps["memory"]["bare"].values()) == {None}


def test_steps_come_with_their_alignment_and_a_ratio(results):
    out, _ = results
    for case in json.loads((out / "step.json").read_text())["cases"]:
        assert not case.get("refused")
        for mode, cosine in case.get("alignment_cosine", {}).items():
            assert cosine >= (0.9 if case["precision"] == "fp32" else 0.7) and mode in case["ratio_to_bare"]


@pytest.fixture
def filled(results, tmp_path, monkeypatch):
    """A folder of committed results as a GPU would leave it; the function changes parts of it."""
    out, _ = results
    folder = tmp_path / "bench" / "results" / "gpu-h100"
    folder.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path)

    def write(**changed):
        for part in PARTS:
            kept = json.loads((out / f"{part}.json").read_text()) | {"tiny": False, "date": "2026-11-21"}
            kept["machine"] |= {"gpu": "NVIDIA H100", "commit": "abc", "dirty": False}
            change = changed.get(part, {})
            kept["machine"] = change.get("machine", kept["machine"] | change.get("made", {}))
            if kept["machine"] is None:
                kept = {"part": part, "machine": None, "complete": False, "cases": [], "fault": "exit status 1"}
            (folder / f"{part}.json").write_text(json.dumps(kept | change.get("kept", {})))
        return report.gpu()

    return write


def test_a_run_on_a_gpu_is_told_with_its_name_date_and_commit(filled):
    text = filled()
    assert text.splitlines()[0] == f"### NVIDIA H100, torch {torch.__version__}, commit abc, 2026-11-21"
    assert "#### kernels" in text and "Measured on" not in text


def test_results_are_taken_into_the_report_under_the_name_of_the_gpu(filled, tmp_path):
    filled()
    results = tmp_path / "bench" / "results"
    (results / "gpu-h100").rename(tmp_path / "out")
    assert report.gpu() == "Not measured on a GPU."
    (results / "gpu-nvidia-h100").mkdir()
    (results / "gpu-nvidia-h100" / "old.json").write_text("of an earlier run")
    assert take.taken(tmp_path / "out", results) == results / "gpu-nvidia-h100"
    assert {path.stem for path in (results / "gpu-nvidia-h100").iterdir()} == set(PARTS)
    assert report.gpu().startswith("### NVIDIA H100")


def test_what_is_no_run_on_a_gpu_is_not_taken(results, tmp_path):
    out, _ = results
    for folder in (out, tmp_path):
        with pytest.raises(SystemExit, match="no figures of one GPU"):
            take.taken(folder, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_dead_part_takes_no_other_out_of_the_report(filled):
    text = filled(environment={"machine": None})
    assert text.startswith("### NVIDIA H100") and "fault: exit status 1" in text and "| optimistic |" in text
    assert filled(**{part: {"machine": None} for part in PARTS}) == "Not measured on a GPU."


def test_parts_of_another_run_say_so(filled):
    text = filled(step={"made": {"commit": "def", "dirty": True}, "kept": {"date": "2026-11-22"}})
    assert f"Measured on NVIDIA H100, torch {torch.__version__}, commit def, changed since, 2026-11-22" in text
    assert text.count("Measured on") == 1


@pytest.mark.parametrize("change", [{"made": {"gpu": None}}, {"kept": {"tiny": True}}])
def test_what_is_no_figure_of_a_gpu_is_not_reported(filled, change):
    assert filled(step=change) == "Not measured on a GPU."


def test_without_a_gpu_nothing_is_measured_at_full_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class TestSuite:
    """Parts are launched in turn; what becomes of one does not matter to the next."""

    def launching(self, out, clock, spent, faults=None, crashed=()):
        self.shares = {}

        def launch(part, seconds):
            self.shares[part] = seconds
            if part in crashed:
                Book(out / f"{part}.json", part, seconds).case("first", 0, lambda row: None)
            else:
                Book(out / f"{part}.json", part, seconds).finish()
            clock.time += min(spent, seconds)
            return (faults or {}).get(part)

        return launch

    def test_a_part_that_dies_stops_no_other_and_is_told_at_the_end(self, tmp_path, capsys):
        clock = Clock()
        launch = self.launching(tmp_path, clock, 1, {"kernels": "exit status -11"}, crashed=["kernels"])
        assert gpu.suite(tmp_path, 100, launch, clock) == 1
        assert list(self.shares) == list(PARTS)
        kept = json.loads((tmp_path / "kernels.json").read_text())
        assert kept["fault"] == "exit status -11" and not kept["complete"]
        assert [case["case"] for case in kept["cases"]] == ["first"]
        said = capsys.readouterr().out
        assert "fault: exit status -11" in said and "cut off" in said
        assert (tmp_path / "table.md").read_text().strip() in said

    def test_a_part_that_wrote_nothing_is_told_too(self, tmp_path):
        assert gpu.suite(tmp_path, 100, lambda part, seconds: "exit status 1", Clock()) == 1
        kept = json.loads((tmp_path / "step.json").read_text())
        assert kept["fault"] == "exit status 1" and "stderr" not in kept

    def test_the_last_words_of_a_dead_part_are_kept(self, tmp_path):
        gpu.suite(tmp_path, 100, lambda part, seconds: "exit status 1\nTraceback\nValueError: no", Clock())
        kept = json.loads((tmp_path / "step.json").read_text())
        assert kept["fault"] == "exit status 1" and kept["stderr"] == ["Traceback", "ValueError: no"]

    def test_all_well_is_status_0(self, tmp_path):
        clock = Clock()
        assert gpu.suite(tmp_path, 100, self.launching(tmp_path, clock, 1), clock) == 0

    def test_what_a_part_leaves_over_goes_to_the_next_and_the_whole_is_kept_to(self, tmp_path):
        clock = Clock()
        gpu.suite(tmp_path, 100, self.launching(tmp_path, clock, 1e9), clock)
        assert clock.time == pytest.approx(100)
        assert self.shares == pytest.approx({part: 100 * share for part, (share, _) in PARTS.items()})
        gpu.suite(tmp_path, 100, self.launching(tmp_path, clock, 1), clock)
        assert self.shares["end_to_end"] == pytest.approx(96)

    def test_an_earlier_runs_figures_are_not_taken_for_this_ones(self, tmp_path):
        (tmp_path / "step.json").write_text("{}")
        clock = Clock()
        seen = []
        gpu.suite(tmp_path, 1, lambda part, seconds: seen.append((tmp_path / "step.json").exists()), clock)
        assert not any(seen)


class TestBook:
    def book(self, tmp_path, seconds=10):
        self.clock = Clock()
        return Book(tmp_path / "book.json", "step", seconds, now=self.clock)

    def read(self, tmp_path):
        return json.loads((tmp_path / "book.json").read_text())

    def test_what_no_longer_fits_is_skipped_and_said_to_be(self, tmp_path):
        book = self.book(tmp_path)
        ran = []

        def slow(row):
            ran.append(row["case"])
            self.clock.time += 6

        for name in ("a", "b", "c"):
            book.case(name, 5, slow)
        assert ran == ["a"]
        states = [(case["status"], case.get("why", "")[:10]) for case in self.read(tmp_path)["cases"]]
        assert states == [("done", ""), ("skipped", "4 s were l"), ("skipped", "4 s were l")]
        assert book.finish()

    def test_a_case_that_fails_stops_no_other_and_keeps_what_it_had_found(self, tmp_path):
        book = self.book(tmp_path)

        def failing(row):
            row["found"] = 1
            raise ValueError("no")

        def full(row):
            raise torch.OutOfMemoryError("out")

        book.case("a", 0, failing)
        book.case("b", 0, full)
        book.case("c", 0, lambda row: row.update(found=2))
        kept = self.read(tmp_path)
        assert [case["status"] for case in kept["cases"]] == ["failed", "out of memory", "done"]
        assert [case.get("found") for case in kept["cases"]] == [1, None, 2]
        assert kept["cases"][0]["why"] == "ValueError: no"
        assert not book.finish()

    def test_after_a_device_is_lost_what_was_found_is_written_and_the_rest_is_skipped(self, tmp_path, monkeypatch):
        book = self.book(tmp_path)
        seen = []

        def release():
            seen.append(self.read(tmp_path)["cases"][0]["found"])
            raise RuntimeError("CUDA error: an illegal memory access\nmore")

        monkeypatch.setattr("gpu_parts.book.release", release)
        row = book.case("a", 0, lambda row: row.update(found=1))
        assert seen == [1]
        assert (row["status"], row["why"]) == ("failed", "RuntimeError: CUDA error: an illegal memory access")
        row = book.case("b", 0, lambda row: row.update(found=2))
        assert row["status"] == "skipped" and "device was lost" in row["why"] and "found" not in row
        assert self.read(tmp_path)["cases"][1] == row and not book.finish()

    def test_a_lack_of_memory_without_a_word_is_one_too(self, tmp_path):
        def full(row):
            raise torch.OutOfMemoryError("")

        assert self.book(tmp_path).case("a", 0, full)["status"] == "out of memory"

    def test_the_file_is_whole_after_every_case_and_says_that_there_is_more_to_come(self, tmp_path):
        book = self.book(tmp_path)
        assert self.read(tmp_path)["cases"] == []
        book.case("a", 0, lambda row: None)

        def stopped(row):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            book.case("b", 0, stopped)
        kept = self.read(tmp_path)
        assert [case["case"] for case in kept["cases"]] == ["a"] and not kept["complete"]


def test_the_command_runs_a_part_by_its_name(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--only", "environment", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "## environment" in done.stdout
    assert json.loads((tmp_path / "environment.json").read_text())["complete"]
