"""A build whose CUDA part fails still gives the CPU extension, unless it was asked for whole."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])

# A torch with CUDA as far as setup.py can see, and a compiler for it that tells its version and fails at all else.
AS_IF = """
import sys, runpy
import torch
from torch.utils import cpp_extension
torch.version.cuda = "12.4"
cpp_extension.CUDA_HOME = {home!r}
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
NVCC = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 12.4, V12.4.1";; *) echo no GPU today >&2; exit 1;; esac
"""


def build(folder, **environment):
    """Builds a copy of the sources there, in place."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "fastlur", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TORCH_CUDA_ARCH_LIST": "8.0", **environment}
    command = [sys.executable, "-c", AS_IF.format(home=str(nvcc.parent.parent))]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(COMPILER is None and os.environ.get("FASTLUR_EXT") != "1", reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get("FASTLUR_SANITIZE") == "1", reason="says nothing about memory")
def test_a_failing_cuda_build_leaves_the_cpu_extension(tmp_path):
    done = build(tmp_path, FASTLUR_EXT="")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: fastlur")]
    assert len(warnings) == 1 and "without the CUDA part" in warnings[0], done.stderr
    assert len(list(tmp_path.glob("fastlur/_native*.so"))) == 1, done.stderr
    (library,) = tmp_path.glob("fastlur/_native*.so")
    code = "from fastlur import _extension as e; print(e.load(), e.missing(), e.missing('cuda'))"
    environment = {**os.environ, "FASTLUR_EXT_PATH": str(library)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split(maxsplit=2) == ["None", "None", "it was built without cuda kernels\n"]


@pytest.mark.skipif(COMPILER is None and os.environ.get("FASTLUR_EXT") != "1", reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get("FASTLUR_SANITIZE") == "1", reason="says nothing about memory")
def test_it_is_fatal_where_the_extension_was_asked_for(tmp_path):
    done = build(tmp_path, FASTLUR_EXT="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("fastlur/*.so"))
