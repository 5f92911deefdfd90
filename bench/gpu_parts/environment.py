"""The machine: what is installed, what the driver says, and the two ceilings of everything that is measured later."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from functools import partial

import torch

import fastlur
from gpu_parts.book import Book, Options, Row, device
from gpu_parts.timing import sampled, spread, tf32

ASKED = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,"
    "power.draw,temperature.gpu,persistence_mode"
)
PACKAGES = ("torch", "triton", "numpy", "ninja", "setuptools", "pytest", "pytest-benchmark", "timm", "transformers")


def run(book: Book, options: Options) -> None:
    book.case("software", 0, software)
    book.case("device", 0, driver)
    size = 1 << (18 if options.tiny else 28)
    side = 64 if options.tiny else 8192
    book.case("copy", 2, lambda row: copy(row, size, options.tiny))
    for kind in ("bf16", "tf32", "fp32"):
        book.case(f"matrix product, {kind}", 2, partial(product, kind=kind, side=side, tiny=options.tiny))
    book.case("clocks after load", 0, driver)


def software(row: Row) -> None:
    """Versions, the compiler, and who serves which operation here."""
    row["python"] = sys.version.split()[0]
    row["cuda"] = torch.version.cuda
    row["packages"] = {name: _version(name) for name in PACKAGES}
    row["nvcc"] = _said("nvcc", "--version").splitlines()[-1:] or None
    row["tools"] = {name: shutil.which(name) is not None for name in ("ninja", "g++", "nvcc", "compute-sanitizer")}
    row["fastlur"] = fastlur.info()


def driver(row: Row) -> None:
    """What nvidia-smi says now; nothing is set."""
    values = _said("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader").splitlines()
    row["nvidia_smi"] = dict(zip(ASKED.split(","), values[0].split(", "), strict=False)) if values else None
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        row["multiprocessors"], row["memory_bytes"] = about.multi_processor_count, about.total_memory
        row["l2_bytes"] = getattr(about, "L2_cache_size", None)
        row["capability"] = list(torch.cuda.get_device_capability())


def copy(row: Row, size: int, tiny: bool) -> None:
    """A copy from device memory to device memory; bytes read and bytes written both count."""
    source, target = torch.rand(2, size, device=device())
    times = sampled({"copy": lambda: target.copy_(source)}, 0.05 if tiny else 1.0)["copy"]
    row["bytes"] = 2 * 4 * size
    row["seconds"] = spread(times)
    row["gigabytes_per_second"] = round(row["bytes"] / row["seconds"][0] / 1e9, 1)


def product(row: Row, kind: str, side: int, tiny: bool) -> None:
    """A square matrix product of random numbers by torch."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device()).to(dtype)
    out = torch.empty_like(a)
    with tf32(kind == "tf32"):
        times = sampled({"product": lambda: torch.mm(a, b, out=out)}, 0.05 if tiny else 1.0)["product"]
    row["side"] = side
    row["seconds"] = spread(times)
    row["teraflops"] = round(2 * side**3 / row["seconds"][0] / 1e12, 3)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
