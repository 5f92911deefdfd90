"""What the suite needs beside torch, looked for before anything starts; nothing but the standard library is imported.

    python bench/gpu_parts/needs.py [MODULE …]

Exit status 2 and one line where something is missing; modules named are needed too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable

# module: what pip calls it
NEEDED = {"torch": "torch", "numpy": "numpy", "safetensors": "safetensors", "tqdm": "tqdm"}
# without these a part is skipped, or a case of one
WANTED = {"triton": "triton", "pytest": "pytest", "sklearn": "scikit-learn", "scipy": "scipy"}


def missing(modules: Iterable[str]) -> list[str]:
    """Those that are not there."""
    return [name for name in modules if not here(name)]


def here(name: str) -> bool:
    """Whether a module can be found."""
    return importlib.util.find_spec(name) is not None


def complaint(more: Iterable[str] = ()) -> str | None:
    """What is missing and how to get it, in one line; None where all that is needed is there."""
    names = [NEEDED.get(name, name) for name in missing([*NEEDED, *more])]
    return f"missing: {', '.join(names)}; get them with: pip install {' '.join(names)}" if names else None


def remark() -> str | None:
    """What would show more, in one line; None where all of it is there."""
    names = [WANTED[name] for name in missing(WANTED)]
    return f"not there: {', '.join(names)}; what needs them is skipped" if names else None


if __name__ == "__main__":
    told = complaint(sys.argv[1:])
    if told is not None:
        sys.exit(print(told, file=sys.stderr) or 2)
