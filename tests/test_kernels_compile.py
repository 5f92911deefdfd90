"""The kernels compile for real GPUs, with accesses of 16 bytes; no GPU is needed for that.

In a process of its own, because here the kernels may have been handed to the interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

BUILD = """
import importlib, json, re
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(module, kernel, element, table, arch, lists, rest, **constants):
    kernel = getattr(importlib.import_module("fastlur.kernels." + module), kernel)
    given = dict.fromkeys(lists, "*" + element) | dict.fromkeys(rest, "*fp64")
    given |= dict.fromkeys(("programs", "origin", "number", "tensors", "width"), "i32") | {"size": "i64", "keep": "*u8"}
    given |= {"table": "*i64", "owner": "*i32", "ranges": "*i64"} if table else {}
    if "keep" not in lists:
        del given["keep"]
    constants |= {"COMPUTE": tl.float64 if element == "fp64" else tl.float32, "ALIGNED": table}
    types = {name: "constexpr" if name in constants else given.get(name, "constexpr") for name in kernel.arg_names}
    values = {name: constants.get(name) for name, kind in types.items() if kind == "constexpr"}
    wide = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    source = ASTSource(kernel, types, values, wide)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]

penalty = ["grad", "theta", "theta0", "fisher"]
update = ["theta", "moment1", "a", "u", "theta0", "fisher", "keep"]
kernels = [
    ("displace", "displace_kernel", ["out", "theta", "d"], ["alpha", "norm2"], {}),
    ("dot", "dot_kernel", ["a", "b"], ["partials"], {"PARTIALS": 1024}),
    ("project", "project_kernel", ["a", "b"], ["dots"], {"KIND": "symmetric"}),
    ("project", "project_kernel", ["a", "b"], ["dots"], {"KIND": "scissorhands"}),
    ("regularize", "regularize_kernel", penalty, ["hyper", "partials"], {"PARTIALS": 1024}),
    ("update", "update_kernel", update, ["control", "hyper"], {}),
    ("update", "update_kernel", [*update, "moment2"], ["control", "hyper"], {}),
    ("update", "update_kernel", ["theta", "moment1", "a"], ["control", "hyper"], {}),
    ("extrapolate", "extrapolate_kernel", ["theta", "theta0", "memorised"], ["alpha", "eta"], {}),
    ("saliency", "saliency_kernel", ["out", "grad", "theta"], [], {}),
]
counts = []
for module, kernel, lists, rest, constants in kernels:
    block = importlib.import_module("fastlur.kernels." + module).BLOCK
    for element, arch, table in (("fp32", 90, True), ("bf16", 80, False), ("fp64", 90, True)):
        ptx = build(module, kernel, element, table, arch, lists, rest, BLOCK=block, **constants)
        bytes_each = {"fp32": 4, "bf16": 2, "fp64": 8}[element]
        # what 256 threads need to read their block once, 16 bytes at a time; the mask is one byte an element
        asked = sum(block * bytes_each // 256 // 16 for name in lists if name not in ("keep", "out"))
        wide = len(re.findall(r"ld\\.global\\S*\\.v(?:4\\.b32|2\\.b64)", ptx))
        counts.append([f"{kernel} {lists} {element} table={table}", wide, asked])
build("control", "control_kernel", "fp32", False, 90, ["losses"], ["control", "dots", "hyper"], LANES=2)
for table in (False, True):
    build("reduction", "finish_kernel", "fp64", table, 90, [], ["total", "each", "partials"], ADDED=1024)
print(json.dumps(counts))
"""


def test_all_kernels_compile_and_read_sixteen_bytes_at_a_time(tmp_path):
    triton = pytest.importorskip("triton")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton was built without a compiler for NVIDIA GPUs")
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout.splitlines()[-1])
    assert len(counts) == 30
    for name, wide, asked in counts:
        assert wide == asked, name
