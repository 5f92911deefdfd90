"""What this installation consists of."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fastlur import backends
from fastlur._version import __version__


def info() -> dict[str, Any]:
    """Versions, the device, and which backend serves the vector operations.

    Returns:
        A dict of plain values: "fastlur", "python", "torch", "triton" (None where absent), "device", "operations" (for
        each operation and device type the backend "served_by" which it is, why each of the "others" is not in service,
        and what the code of each has been through: "checked", which tells of CUDA also where there is no such device).
    """
    cuda = torch.cuda.is_available()
    return {
        **versions(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)",
        "operations": {name: backends.describe() for name in backends.OPERATIONS}
        | {"threshold": backends.describe(fused=False)},
    }


def versions() -> dict[str, str | None]:
    """Of this package, Python, torch and Triton (None where absent)."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "fastlur": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }
