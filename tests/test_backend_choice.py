"""Who serves is found out once, never during a capture, and not on the word of a failure that passes."""

import pytest
import torch

from fastlur import backends


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
