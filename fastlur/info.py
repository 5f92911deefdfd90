"""What this installation consists of."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fastlur._version import __version__

OPERATIONS = ("grad_dot", "displace", "step_control", "meta_update")


def info() -> dict[str, Any]:
    """Versions, the device, and which backend serves each operation.

    Returns:
        A dict of plain values: "fastlur", "python", "torch", "triton" (None where absent), "device", "operations".
    """
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cuda = torch.cuda.is_available()
    return {
        "fastlur": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({torch.get_num_threads()} threads)",
        "operations": dict.fromkeys(OPERATIONS, "torch"),
    }
