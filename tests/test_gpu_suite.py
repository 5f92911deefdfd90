"""The plumbing of the GPU suite, at sizes a CPU does in seconds: what it writes, and what when things go wrong."""

import gzip
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gpu
import pytest
import torch
from gpu_parts import PARTS, end_to_end, mnist, timing
from gpu_parts.book import Book, Options
from gpu_parts.processes import contained
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
    steps = json.loads((out / "step.json").read_text())["cases"][0]
    assert set(steps["memory"]["bare"].values()) == {None}


def test_steps_come_with_their_alignment_and_refused_ones_without_a_ratio(results):
    out, _ = results
    for case in json.loads((out / "step.json").read_text())["cases"]:
        for mode, cosine in case.get("alignment_cosine", {}).items():
            least = 0.9 if case["precision"] == "fp32" else 0.7
            assert (mode in case["ratio_to_bare"]) == (cosine >= least)
            assert (mode in case["refused"]) == (cosine < least)


def test_kernels_are_compared_with_float64(results, monkeypatch):
    out, _ = results
    import operations
    from gpu_parts import kernels

    def wrong(*_):
        raise AssertionError("off by one")

    monkeypatch.setattr(operations, "check", wrong)
    book = Book(out / "wrong.json", "kernels", 100)
    row = book.case("sgd", 0, lambda row: kernels.one(row, "sgd", "three", [(3,)], 0.01))
    assert row["status"] == "failed" and "off by one" in row["why"]
    assert row["gigabytes_per_second"] == {}


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


class TestProcesses:
    """What a part started does not outlive it, however it ends: it would be in the figures of the next."""

    # prints the ids of a child of its own group and of one in a group of its own, both sleeping
    FAMILY = (
        "import subprocess as s, sys, pathlib; sleep = ['sleep', '600'];"
        "ids = [s.Popen(sleep).pid, s.Popen(sleep, process_group=0).pid];"
        "pathlib.Path(sys.argv[1]).write_text(' '.join(map(str, ids)));"
    )

    def gone(self, path):
        def running(number):
            try:
                return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                return False

        numbers = path.read_text().split()
        end = time.monotonic() + 60
        while (left := [each for each in numbers if running(each)]) and time.monotonic() < end:
            time.sleep(0.01)
        return len(numbers) == 2 and not left

    @pytest.mark.parametrize("last", ["", "sys.exit(3)", "s.Popen(sleep).wait()"])
    def test_a_part_ends_with_all_it_started(self, tmp_path, last):
        command = [sys.executable, "-c", self.FAMILY + last, str(tmp_path / "ids")]
        fault = gpu.process(command, 60 if last != "s.Popen(sleep).wait()" else 5)
        assert fault == {"": None, "sys.exit(3)": "exit status 3"}.get(last, "ended from outside after 5 s")
        assert self.gone(tmp_path / "ids")

    def test_a_command_of_a_part_ends_with_all_its_group(self, tmp_path):
        code = self.FAMILY.replace(", process_group=0", "") + "s.Popen(sleep).wait()"
        with pytest.raises(subprocess.TimeoutExpired):
            contained([sys.executable, "-c", code, str(tmp_path / "ids")], 5)
        assert self.gone(tmp_path / "ids")

    def test_what_it_says_is_handed_over(self):
        done = contained(["sh", "-c", "echo a; echo b >&2; exit 3"], 60)
        assert (done.stdout, done.stderr, done.returncode) == ("a\n", "b\n", 3)

    def test_statuses_and_the_last_words_of_a_dead_part(self, capfd):
        assert gpu.process(["true"], 60) is None
        assert gpu.process(["false"], 60) == "exit status 1"
        assert gpu.process(["sh", "-c", "seq 30 >&2; exit 4"], 60).split() == [
            *["exit", "status", "4"],
            *map(str, range(11, 31)),
        ]
        assert capfd.readouterr().err.split() == [str(k) for k in range(1, 31)]

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
    def test_a_suite_that_is_stopped_ends_its_part_and_says_what_it_has(self, tmp_path, number, status):
        family = [sys.executable, "-c", self.FAMILY + "s.Popen(sleep).wait()", str(tmp_path / "ids")]
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
            f"import sys; sys.path.insert(0, {str(gpu.HERE)!r}); import gpu; from pathlib import Path\n"
            f"with gpu.stoppable(): gpu.suite(Path({str(tmp_path)!r}), 600, lambda *_: gpu.process({family!r}, 600))"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + 120
        while not (tmp_path / "ids").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        child.send_signal(number)
        said, _ = child.communicate(timeout=120)
        assert child.returncode == status if status else child.returncode
        assert "## environment" in said and "the suite was stopped" in said and (tmp_path / "table.md").exists()
        assert self.gone(tmp_path / "ids")


class TestMnist:
    """The four files, wherever they lie below the folder, are looked for before anything starts."""

    def write(self, folder, packed):
        folder.mkdir(parents=True)
        pixels = torch.arange(2 * 28 * 28, dtype=torch.int32).remainder(256).to(torch.uint8)
        for name in mnist.FILES:
            sizes, raw = ((2, 28, 28), pixels) if "images" in name else ((2,), pixels[3:5])
            head = bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)
            content = head + bytes(raw.tolist())
            (folder / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("below", ["", "MNIST/raw"])
    def test_they_are_read(self, tmp_path, below, packed):
        self.write(tmp_path / "data" / below, packed)
        (images, labels), (test, _) = mnist.mnist(tmp_path / "data", 1)
        assert images.shape == (1, 1, 28, 28) and test.shape == (2, 1, 28, 28)
        assert images.view(-1)[:300].tolist() == pytest.approx([(k % 256) / 255 for k in range(300)])
        assert labels.tolist() == [3]

    def test_what_is_missing_is_said_before_the_first_part(self, tmp_path, capsys):
        self.write(tmp_path / "data", True)
        (tmp_path / "data" / "t10k-labels-idx1-ubyte.gz").unlink()
        assert gpu.main(["--tiny", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]) == 2
        assert "--data" in capsys.readouterr().err and not (tmp_path / "out").exists()


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


def without(modules, *arguments):
    """The command where these modules are not there."""
    blocked = f"import runpy, sys; sys.modules.update(dict.fromkeys({modules!r}))"
    code = (
        f"{blocked}; sys.argv[1:] = {list(map(str, arguments))!r}; runpy.run_module('bench.gpu', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True, check=False)


def test_what_is_missing_is_said_in_one_line_before_anything_starts(tmp_path):
    done = without(["numpy", "tqdm"], "--tiny", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "missing: numpy, tqdm; get them with: pip install numpy tqdm"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "skipped"),
    [
        ("kernels", None),
        ("step", None),
        ("correctness", "pytest is not there"),
        ("end_to_end", "scikit-learn is not there"),
    ],
)
def test_a_part_runs_with_what_a_machine_with_torch_has(tmp_path, part, skipped):
    absent = ["pytest", "_pytest", "sklearn", "scipy", "hypothesis", "pytest_benchmark", "matplotlib"]
    done = without(absent, "--tiny", "--only", part, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / f"{part}.json").read_text())["cases"]
    assert cases and {case["status"] for case in cases} <= {"done", "skipped"}
    reasons = {case["why"] for case in cases if case["status"] == "skipped"}
    assert skipped in reasons if skipped else not [why for why in reasons if "not there" in why]


def test_the_command_runs_a_part_by_its_name(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--only", "environment", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "## environment" in done.stdout
    assert json.loads((tmp_path / "environment.json").read_text())["complete"]
