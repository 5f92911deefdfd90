"""Who serves is found out once, never during a capture, and not on the word of a failure that passes."""

import asyncio
import importlib.metadata
import threading
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, kernels

import fastlur
from fastlur import _extension, backends, ops


@pytest.fixture
def cuda(monkeypatch):
    """As if there were a GPU on which the probe of the kernels does what is said here."""
    state = {"capturing": False, "outcome": None, "probes": 0}

    def probe():
        state["probes"] += 1
        if isinstance(state["outcome"], Exception):
            raise state["outcome"]
        return state["outcome"]

    monkeypatch.setattr(backends, "_probe", probe)
    monkeypatch.setattr(backends, "_triton", [])
    monkeypatch.setattr(backends, "_resolved", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    return state


def test_the_kernels_are_probed_once(cuda):
    for _ in range(3):
        assert backends.resolve("cuda")[0] == "triton"
        assert backends.serving("cuda") == "triton"
    assert cuda["probes"] == 1


def test_a_wrong_sum_is_a_verdict(cuda):
    cuda["outcome"] = "gave a wrong sum"
    assert backends.unavailable("triton", "cuda") == "gave a wrong sum"
    cuda["outcome"] = None
    assert backends.resolve("cuda")[0] != "triton"
    assert cuda["probes"] == 1


def test_a_compiler_that_fails_is_a_verdict(cuda):
    cuda["outcome"] = OSError("no compiler\nand more")
    for _ in range(2):
        assert backends.unavailable("triton", "cuda") == "OSError: no compiler"
    assert cuda["probes"] == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_full_memory_is_none(cuda, error):
    cuda["outcome"] = error
    assert backends.resolve("cuda")[0] != "triton"
    cuda["outcome"] = None
    assert backends.resolve("cuda")[0] == "triton"


def test_nothing_is_probed_while_a_graph_is_captured(cuda):
    cuda["capturing"] = True
    assert backends.resolve("cuda")[0] == "triton"
    assert cuda["probes"] == 0
    # what was assumed is not kept
    cuda.update(capturing=False, outcome="gave a wrong sum")
    assert backends.resolve("cuda")[0] != "triton"
    # what was found out is
    cuda["capturing"] = True
    assert backends.resolve("cuda")[0] != "triton"
    assert cuda["probes"] == 1


def test_another_wish_is_another_answer(cuda, monkeypatch):
    assert backends.resolve("cuda")[0] == "triton"
    with backends.backend("torch"):
        assert backends.resolve("cuda")[0] == "torch"
        assert backends.resolve("cpu")[0] == "torch"
    monkeypatch.setenv(backends.VARIABLE, "torch")
    assert backends.resolve("cuda")[0] == "torch"
    monkeypatch.delenv(backends.VARIABLE)
    assert backends.resolve("cuda")[0] == "triton"


@pytest.fixture
def cpu(monkeypatch):
    """As if nobody had asked for a backend, and the extension were there or not."""
    monkeypatch.setattr(backends, "_resolved", {})
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    return lambda reason: monkeypatch.setattr(_extension, "missing", lambda device="cpu": reason)


def test_on_the_cpu_the_extension_serves_where_it_is_there(cpu):
    cpu("it was not built")
    assert backends.serving("cpu") == "torch"
    cpu(None)
    assert backends.serving("cpu") == "extension"


def test_info_gives_the_reason_why_another_one_does_not_serve(cpu):
    cpu("it was not built; with a C++ compiler, `make ext` builds it")
    told = fastlur.info()["operations"]["displace"]["cpu"]
    assert told["served_by"] == "torch"
    assert told["others"] == {
        "triton": "Triton kernels run on CUDA tensors",
        "extension": "it was not built; with a C++ compiler, `make ext` builds it",
    }
    cpu(None)
    with backends.backend("torch"):
        told = fastlur.info()["operations"]["displace"]["cpu"]
    assert told["others"]["extension"] == "torch comes first (FASTLUR_BACKEND=extension asks for this one)"


def test_info_knows_the_versions(monkeypatch):
    told = fastlur.info()
    assert told["triton"] == importlib.metadata.version("triton")
    assert told["torch"] == torch.__version__ and told["fastlur"] == fastlur.__version__

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert fastlur.info()["triton"] is None


def test_an_extension_that_is_found_later_serves_from_then_on_and_info_says_so(cpu, monkeypatch):
    libraries = sorted(Path(_extension.__file__).parent.glob("_native*.so"))
    if _extension.load() is not None or not libraries:
        pytest.skip("the extension was not built")
    monkeypatch.setattr(_extension, "_failure", "not loaded yet")
    monkeypatch.setenv("FASTLUR_EXT_PATH", "/nowhere.so")
    ops.grad_dot(torch.ones(2), torch.ones(2))
    assert backends.resolve("cpu")[0] == "torch" == fastlur.info()["operations"]["displace"]["cpu"]["served_by"]
    assert _extension.load(libraries[0]) is None
    assert backends.resolve("cpu")[0] == "extension" == fastlur.info()["operations"]["displace"]["cpu"]["served_by"]


def test_a_choice_holds_in_its_thread_and_in_tasks_begun_inside(cpu):
    cpu(None)
    seen = []

    async def ask():
        return backends.serving("cpu")

    with backends.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(backends.serving("cpu")))
        thread.start()
        thread.join()
        seen.append(asyncio.run(ask()))
        with backends.backend("extension"):
            seen.append(backends.serving("cpu"))
        seen.append(backends.serving("cpu"))
    assert seen == ["extension", "torch", "extension", "torch"]
    assert backends.serving("cpu") == "extension"


def test_the_probe_is_a_sum_of_the_kernels(monkeypatch):
    assert backends._probe(DEVICE) is None
    right = kernels.grad_dot

    def wrong(a, b):
        total, each = right(a, b)
        return total * 1.01, each

    monkeypatch.setattr(kernels, "grad_dot", wrong)
    assert backends._probe(DEVICE) == "gave a wrong sum on this device"
