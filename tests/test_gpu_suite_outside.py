"""The GPU suite and the machine it runs on: processes that must end, modules and data that may be missing."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch
from gpu_parts import mnist
from gpu_parts.processes import contained


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
