"""A long run under watch: what the process holds and how many tensors there are, from step to step.

Run as a program with the name of a method, "MetaStep" for a loop of one's own, and a number of steps; prints JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch
from helpers import blobs, mlp

import fastlur

LOOKS = 10
SETTLED = 2  # looks until allocators and caches have what they need


def held() -> dict[str, int]:
    """Bytes that the process holds in memory and has in tensors, and how many of those and of all objects there are."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * 4096
    every = gc.get_objects()
    tensors = [each for each in every if type(each) in (torch.Tensor, torch.nn.Parameter)]
    bytes_of = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return {"resident": resident, "tensors": len(tensors), "tensor bytes": bytes_of, "objects": len(every)}


def watch(method: str, steps: int) -> list[dict[str, int]]:
    """A run of so many steps, looked at ten times."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    looks: list[dict[str, int]] = []
    every = steps // LOOKS

    def look(event: Any) -> None:
        if event.step % every == 0:
            looks.append(held())

    model, forget, retain = mlp(), blobs(24), blobs(64)
    if method == "MetaStep":
        with fastlur.MetaStep(model, lr=1e-3, max_grad_norm=1.0) as step:
            for _ in range(steps):
                look(step(forget, retain))
        return looks
    # deeper in no loss: rates this small keep every number finite for as long as it takes
    options: dict[str, Any] = {"lr": 1e-4, "max_grad_norm": 1.0, "callbacks": [look], "progress": False}
    fastlur.unlearn(model, forget, retain, method=method, steps=steps, batch_size=8, **options)
    return looks


if __name__ == "__main__":
    print(json.dumps(watch(sys.argv[1], int(sys.argv[2]))))
