"""The truth first: the extension compiled here, the tests that need a GPU, and the checker of memory accesses.

The statements themselves are tests, run by pytest in processes of their own; here stands which, in what order, and what
became of each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

from fastlur import _extension
from gpu_parts.book import Book, Options, Row, Skip
from gpu_parts.needs import here
from gpu_parts.processes import contained

GPU = "tests/test_kernels_gpu.py"
HEAVY = "thirty_first or repetitions"
# name, seconds it is likely to take, what pytest is told
FULL: list[tuple[str, float, list[str]]] = [
    ("four gradients, contract, resume, no wait", 15, ["tests/test_device.py"]),
    ("operations against float64, capture, launches", 20, [GPU, "-k", f"not ({HEAVY})"]),
    ("whole steps captured", 15, ["tests/test_capture.py"]),
    ("2^31 elements and 1,000 repetitions", 20, [GPU, "-k", HEAVY]),
    ("kernels, every operation and size", 15, ["tests/test_backends.py", "tests/test_kernels_dot.py"]),
    (
        "kernels, elementwise, lists and update",
        20,
        ["tests/test_kernels_elementwise.py", "tests/test_kernels_lists.py", "tests/test_kernels_update.py"],
    ),
    ("extension", 5, ["tests/test_extension.py", "tests/test_ops_repeated.py"]),
    (
        "extension, every operation and size",
        10,
        ["tests/test_extension_elementwise.py", "tests/test_extension_sums.py", "tests/test_extension_update.py"],
    ),
    ("kernels compile, 16 bytes an access", 15, ["tests/test_kernels_compile.py"]),
]
TINY: list[tuple[str, float, list[str]]] = [("the flag", 0, ["tests/test_backends.py", "-k", "not_finite and torch"])]
SANITIZED = [GPU, "-k", "against_float64 and list and float32 and not torch", "-x"]


def run(book: Book, options: Options) -> None:
    book.case("extension built here", 0, lambda row: extension(row, book, options.tiny))
    for name, expected, told in TINY if options.tiny else FULL:
        book.case(name, expected, lambda row, told=told: tests(row, told, book.left()))
    book.case("compute-sanitizer, memcheck", 25, lambda row: sanitizer(row, book.left(), options.tiny))


def extension(row: Row, book: Book, tiny: bool) -> None:
    """Whether the extension serves this device; if not, it is built in place. A failure is told, and is not fatal."""
    row["missing"] = _extension.missing("cuda" if torch.cuda.is_available() else "cpu")
    if row["missing"] is None:
        row["outcome"] = "was there"
        return
    if tiny:
        raise Skip("is not built for a test of the plumbing")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"FASTLUR_EXT": "1"}
    try:
        done = contained(command, 0.6 * book.left(), environment)
    except subprocess.TimeoutExpired:
        row["outcome"] = "the build took too long"
        return
    row["missing"] = _missing()
    row["outcome"] = "built" if done.returncode == 0 else "the build failed"
    if row["missing"] is not None:
        row["told"] = (done.stdout + done.stderr).splitlines()[-30:]


def tests(row: Row, told: list[str], left: float) -> None:
    """Run pytest and count; the case fails where a test does."""
    needs_pytest()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", f"--junitxml={report}"]
        try:
            done = contained([*command, *told], left)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not through after {left:.0f} s") from None
        if not report.exists():
            raise AssertionError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        count(row, report)
    row["last_line"] = done.stdout.strip().splitlines()[-1:]
    assert not row["failures"], f"{len(row['failures'])} failed, the first is {next(iter(row['failures']))}"
    assert done.returncode == 0, f"pytest ended with {done.returncode}: {done.stdout[-500:]}"


def needs_pytest() -> None:
    if not here("pytest"):
        raise Skip("pytest is not there")


def count(row: Row, report: Path) -> None:
    """What passed, what was skipped and why, what failed and how."""
    row |= {"passed": 0, "skipped": {}, "failures": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        fault = next((each for each in case if each.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if fault is not None:
            row["failures"][name] = (fault.get("message") or fault.text or "")[:600]
        elif skip is not None:
            why = (skip.get("message") or "")[:200]
            row["skipped"][why] = row["skipped"].get(why, 0) + 1
        else:
            row["passed"] += 1


def sanitizer(row: Row, left: float, tiny: bool) -> None:
    """Accesses out of bounds in the kernels of both backends, with every allocation one of the driver's."""
    tool = shutil.which("compute-sanitizer") or _beside_nvcc()
    if tool is None or tiny:
        raise Skip("compute-sanitizer is not here" if tool is None else "no part of the plumbing")
    needs_pytest()
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all", sys.executable]
    command += ["-m", "pytest", "-p", "no:cacheprovider", "-W", "default", *SANITIZED]
    try:
        done = contained(command, left, environment)
    except subprocess.TimeoutExpired:
        raise Skip(f"not through after {left:.0f} s") from None
    said = (done.stdout + done.stderr).splitlines()
    row["told"] = [line for line in said if line.startswith("=========")][-12:] + said[-3:]
    if "Device not supported" in done.stdout + done.stderr:
        raise Skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, f"exit status {done.returncode} (9: a bad access was found)"


def _beside_nvcc() -> str | None:
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent / "compute-sanitizer" if nvcc else None
    return str(beside) if beside and beside.exists() else None


def _missing() -> str | None:
    """Why the extension cannot serve this device, asked of a fresh process: what was loaded once stays loaded."""
    where = "'cuda' if torch.cuda.is_available() else 'cpu'"
    code = f"import torch; from fastlur import _extension as e; print(e.missing({where}))"
    done = contained([sys.executable, "-c", code], 60)
    said = done.stdout.strip() or done.stderr.strip()[-500:]
    return None if said == "None" else said
