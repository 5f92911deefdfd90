"""The peak memory of one arm in a fresh process, beside what `fastlur.estimate` says of it.

    python bench/memory.py resnet18 8 "scissorhands, cleaned"

On the CPU: anonymous resident memory, of which the kernel keeps the peak, less what there was after the imports and the
same steps on a small model. The C library is told to give freed blocks back at once, and to use one arena, so that what
is resident is what is held. On CUDA: torch's own count.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arms import aim, bare, named, stepping
from conflict import oppose
from models import MODELS

import fastlur

# 64 KiB and more is mapped on its own, and unmapped when freed
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
STEPS = 3
SHARE = 0.9  # of the memory that is free
WARM = "mlp", 2  # model and items of the warm-up
MOMENTS = {"sgd": 1, "adamw": 2}  # vectors of an optimizer
# arms of other precision and optimizer, for what `fastlur.estimate` says of them: what a step takes
ELSEWHERE: dict[str, dict[str, Any]] = {
    "optimistic, in bfloat16": {"precision": "bf16"},
    "exact, in bfloat16": {"precision": "bf16"},
    "optimistic, by AdamW": {"optimizer": "adamw"},
}


def measured(model: str, items: int, arm: str, seconds: float = 4 * 3600) -> dict[str, Any]:
    """What `main` finds, from a process of its own.

    Args:
        model: one of `models.MODELS`.
        items: of each side's batch.
        arm: as `arms` names it, or "bare".
        seconds: how long it may take, on a machine that others use too.

    Raises:
        TooLarge: it needs more memory than there is.
    """
    paths = [str(Path(__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    world = os.environ | MALLOC | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "error", __file__, model, str(items), arm]
    done = subprocess.run(command, env=world, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode and "can't allocate memory" in done.stderr:
        raise TooLarge(f"{' '.join(command[3:])} needs more memory than there is")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class TooLarge(RuntimeError):
    """An arm needs more than this machine has."""


class Meter:
    """Memory beyond what there is when it is made."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        gc.collect()
        self.base = self._now()

    def peak(self) -> int:
        """The peak since the last call, bytes."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return peak - self.base
        status = _status()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        # pages of files, such as code, only ever come: there were no more of them at the peak
        return status["VmHWM"] - status["RssFile"] - status["RssShmem"] - self.base

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _status()["RssAnon"]


def _status() -> dict[str, int]:
    pairs = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, value in pairs if value.endswith("kB")}


def life(name: str, items: int, arm: str, meter: Meter | None) -> dict[str, Any]:
    """One arm from the model's making to its closing: bytes at most until its first step, in its steps, at its end."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make, batch = MODELS[name]
    model = make().to(device)
    forget, retain = (tuple(each.to(device) for each in batch(items, seed)) for seed in (0, 1))
    held = [*model.parameters(), *model.buffers()]
    found: dict[str, Any] = {"parameters": sum(each.nbytes for each in held)}
    del held

    def peak() -> int:
        return 0 if meter is None else meter.peak()

    if arm == "bare":
        step: Any = bare(model, forget, retain, "fp32")
        del model
    else:
        opened = stepping(model, named(arm), forget, retain, forget_loss=aim(arm), **ELSEWHERE.get(arm, {}))
        step = lambda: opened(forget, retain)  # noqa: E731
    times = []
    for number in range(STEPS):
        if number == 1:  # the first makes what the others find
            found["before"] = peak()
            if arm.startswith("scissorhands"):
                oppose(opened.state)  # the dearest of its steps is in conflict
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    found["steps"] = peak()
    if arm != "bare":
        opened.finish()
        opened.close()
    found |= {"after": peak(), "seconds": statistics.median(times[1:])}
    return found


def predicted(name: str, items: int, arm: str) -> dict[str, Any]:
    """What `fastlur.estimate` says."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = tuple(each.to(device) for each in batch(items, 0))
    more = ELSEWHERE.get(arm, {})
    estimate = fastlur.estimate(make().to(device), data, named(arm), forget_loss=aim(arm), **more)
    return vars(estimate) | {"peak": estimate.peak}


def _limit() -> None:
    """Let an allocation beyond what is free fail, rather than have the kernel end some process."""
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(int(free.split()[1]) * 1024 * SHARE),) * 2)


def main(name: str, items: int, arm: str) -> dict[str, Any]:
    """The peaks of an arm, what its own accounting says, and the prediction; bytes and seconds."""
    _limit()
    life(*WARM, arm, None)
    meter = Meter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    meter.peak()
    found = life(name, items, arm, meter)
    found["peak"] = max(found[part] for part in ("before", "steps", "after"))
    if arm != "bare":
        found["vectors"] = named(arm).cost.buffers + MOMENTS[ELSEWHERE.get(arm, {}).get("optimizer", "sgd")]
        found["predicted"] = predicted(name, items, arm)
    return found


if __name__ == "__main__":
    ready = MALLOC.items() <= os.environ.items()  # read when a process begins: without them another one is needed
    print(json.dumps((main if ready else measured)(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
