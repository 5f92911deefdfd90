"""Compiles the CUDA sources for every supported architecture, without a GPU, and reports registers and spills."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ARCHES = ("80", "90")
HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020A000000000000ULL"]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def plain(symbol: str) -> str:
    """The name of a kernel as it stands in the source, where a demangler is at hand."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return symbol
    name = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"fastlur::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", name).split("(")[0]


def main() -> int:
    """Compile each file; the exit status is 1 where one does not compile or spills registers."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on the path: the CUDA sources were not compiled", file=sys.stderr)
        return 1
    bad = False
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHES]
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    for source in sorted(HERE.glob("cuda/*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-c", str(source), "-o", f"{folder}/out.o", "-Xptxas=-v", *FLAGS, *targets, *includes]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout + done.stderr)
            bad = True
            continue
        name, arch, spill = "", "", "0"
        for line in done.stderr.splitlines():
            if "warning" in line:
                print(line)
            if entry := ENTRY.search(line):
                name, arch = entry.groups()
            elif spills := SPILLS.search(line):
                spill = f"{spills[2]}+{spills[3]}"
                bad |= spill != "0+0"
            elif used := REGISTERS.search(line):
                print(f"{source.name:16} sm_{arch}  {used[1]:>3} registers  {spill:>5} bytes spilled  {plain(name)}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
