"""A build whose CUDA part fails still gives the CPU extension, unless it was asked for whole."""

import os

import pytest
from building import COMPILER, ROOT, build, copy_sources, run

pytestmark = [
    pytest.mark.skipif(COMPILER is None and os.environ.get("FASTLUR_EXT") != "1", reason="no C++ compiler"),
    pytest.mark.skipif(os.environ.get("FASTLUR_SANITIZE") == "1", reason="says nothing about memory"),
]

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


def build_as_if(folder, **environment):
    """Builds a copy of the sources there, in place."""
    copy_sources(folder)
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    program = ["-c", AS_IF.format(home=str(nvcc.parent.parent))]
    return run(folder, program, TORCH_CUDA_ARCH_LIST="8.0", **environment)


def test_a_failing_cuda_build_leaves_the_cpu_extension(tmp_path):
    done = build_as_if(tmp_path, FASTLUR_EXT="")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: fastlur")]
    assert len(warnings) == 1 and "without the CUDA part" in warnings[0], done.stderr
    assert len(list(tmp_path.glob("fastlur/_native*.so"))) == 1, done.stderr
    (library,) = tmp_path.glob("fastlur/_native*.so")
    code = "from fastlur import _extension as e; print(e.load(), e.missing(), e.missing('cuda'))"
    loaded = run(ROOT, ["-c", code], FASTLUR_EXT_PATH=str(library))
    assert loaded.stdout.split(maxsplit=2) == ["None", "None", "it was built without cuda kernels\n"]


def test_it_is_fatal_where_the_extension_was_asked_for(tmp_path):
    done = build_as_if(tmp_path, FASTLUR_EXT="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("fastlur/*.so"))


@pytest.mark.parametrize(("wish", "fatal"), [("1", True), ("", False), ("0", False)])
def test_only_a_build_that_was_asked_for_may_fail(tmp_path, wish, fatal):
    copy_sources(tmp_path)
    done = build(tmp_path, "--inplace", FASTLUR_EXT=wish, CXX="/bin/false", CC="/bin/false")
    assert (done.returncode != 0) == fatal, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: fastlur")]
    assert len(warnings) == (wish == "")
    assert not list(tmp_path.glob("fastlur/*.so"))
