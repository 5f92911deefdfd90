"""The compiled extension built from these sources, as an installer would."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
BUILT = ROOT / "build" / "tests"


def run(folder, program, *arguments, **environment):
    """Runs Python there, with this environment's tools on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def build(folder, *arguments, **environment):
    """Runs setup.py's build_ext there."""
    return run(folder, ["setup.py", "build_ext"], *arguments, **environment)


def copy_sources(folder):
    """All that a build needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "fastlur", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))


@functools.cache
def library():
    """The library made of these sources; of several test processes, one builds it and the others find it built."""
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILT / "lock"):
        done = build(ROOT, f"--build-lib={BUILT}/lib", f"--build-temp={BUILT}/temp", FASTLUR_EXT="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (made,) = (BUILT / "lib" / "fastlur").glob("_native*.so")
    return made.resolve()
