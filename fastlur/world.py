"""The caller's world, left as it was found: random state, grad mode, autocast, train/eval mode, determinism."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import nn


def derive(*parts: object) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the generators that passes draw from: the CPU's and the model's device's, and no other."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():  # a graph is of models that do not draw
        torch.cuda.default_generators[_index(device)].manual_seed(seed)


def seed_loading(seed: int) -> None:
    """Seed what transforms of a data set may draw from on the host: torch, NumPy and Python."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (transforms that use the old global state are why this is here)
    random.seed(seed)


def generators(device: torch.device) -> list[bytes]:
    """The states of the generators that a model or a loss may draw from; waits for no device."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    found = [torch.get_rng_state()]
    if device.type == "cuda":
        found.append(torch.cuda.get_rng_state(device))
    host = repr((random.getstate(), rest)).encode(), np.asarray(keys).tobytes()
    return [*host, *(bytes(state.tolist()) for state in found)]  # transforms of torch.func refuse numpy()


@contextmanager
def borrowed_random(device: torch.device) -> Iterator[None]:
    """Inside, the global random generators may be seeded at will; outside, nobody sees that they were."""
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def random_states() -> dict[str, Any]:
    """The states of all global generators, of the host and of every device, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators into states that `random_states` gave; devices that are not there now are left out."""
    kind, keys, place, *rest = states["numpy"]
    if not (isinstance(place, int) and 0 <= place <= len(keys)):  # numpy would read there, wherever that is
        raise ValueError(f"numpy's generator was at {place!r} of {len(keys)}")
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, *rest))  # noqa: NPY002
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode it was in before, whoever changed it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the whole model is in train (or eval) mode; afterwards every module is in its own again."""
    with kept_modes(model):
        for module in model.modules():
            module.training = training
        yield


@contextmanager
def passing(model: nn.Module, device: torch.device, precision: str, training: bool = True) -> Iterator[None]:
    """What every pass runs in: train (or eval) mode, gradients on, the precision asked for and no other autocast.

    The weight cache of autocast is off: it would go on serving the weights cast before a storage swap.
    """
    with ExitStack() as stack:
        stack.enter_context(mode(model, training))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        )
        yield


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms only, if wanted; on CUDA they cost time, on the CPU nothing."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it makes its first handle
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
