"""Whether a saved state fits a step: looked at as a whole before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlur.errors import CheckpointError, told
from fastlur.space import Vector

PARTS = ("step", "method", "control", "vectors", "tensors", "optimizer")


def check_state(state: Any, method: Any, control: Tensor, tensors: Mapping[str, Tensor], custom: bool) -> None:
    """Refuse a state that is of another step, its vectors and the optimizer's own state apart.

    Raises:
        CheckpointError: it is.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"state: a {type(state).__name__} is not what state_dict() returned")
    missing = set(PARTS) - set(state)
    if missing:
        raise CheckpointError(f"state: has no {', '.join(sorted(missing))}; pass what state_dict() returned")
    if state["method"] != method:
        raise CheckpointError(f"state: was taken with {state['method']}, but this is {method}")
    if custom != (state["optimizer"] is not None):
        raise CheckpointError("state: it was taken with another kind of optimizer")
    if not _whole(state["step"], 0):
        raise CheckpointError(f"state: step={state['step']!r} is no number of a step")
    if state.get("rows") is not None and not _whole(state["rows"], 1):
        raise CheckpointError(f"state: rows={state['rows']!r} is neither None nor a positive whole number")
    if not isinstance(state.get("lent", True), bool):
        raise CheckpointError(f"state: lent={state['lent']!r} is neither True nor False")
    _check_tensor("control", state["control"], control)
    for part in ("vectors", "tensors"):
        if not isinstance(state[part], Mapping) or not all(isinstance(name, str) for name in state[part]):
            raise CheckpointError(f"state: {part} is no dict by names")
    for name, tensor in tensors.items():
        if name not in state["tensors"]:
            raise CheckpointError(f"state: has no {name} of shape {tuple(tensor.shape)} of the method")
        _check_tensor(name, state["tensors"][name], tensor)


def check_vectors(vectors: Mapping[str, Vector], names: list[str], saved: Mapping[str, Any]) -> None:
    """Refuse saved vectors that are others, or of other parameters.

    Raises:
        CheckpointError: they are.
    """
    if set(vectors) != set(saved):
        raise CheckpointError(f"state: holds {sorted(saved)}, but this step needs {sorted(vectors)}")
    for key, vector in vectors.items():
        if not isinstance(saved[key], Mapping):
            raise CheckpointError(f"state: {key} is no dict by parameters")
        if set(saved[key]) != set(names):
            odd = sorted(map(str, set(saved[key]) ^ set(names)))
            raise CheckpointError(f"state: {key} is of other parameters, for example {odd[0]!r}")
        for name, view in zip(names, vector.views, strict=True):
            _check_tensor(f"{key}[{name!r}]", saved[key][name], view)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Give an optimizer of the caller's a saved state; where that fails, it has its own again.

    Raises:
        CheckpointError: it does not fit.
    """
    before = optimizer.state_dict()
    with told(CheckpointError, "state: does not fit the optimizer"):
        try:
            optimizer.load_state_dict(state)
            _as_saved(optimizer, state)
        except Exception:
            optimizer.load_state_dict(before)
            raise


def _as_saved(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Torch casts what it loads to the type of the weights; here it comes back as it was, to the bit."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for weight, number in zip(weights, numbers, strict=True):
        for name, value in state["state"].get(number, {}).items():
            now = optimizer.state[weight].get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[weight][name] = value.to(now.device, copy=True)


def _check_tensor(name: str, saved: Any, now: Tensor) -> None:
    if not isinstance(saved, Tensor):
        raise CheckpointError(f"state: {name} is a {type(saved).__name__}, no tensor")
    if saved.shape != now.shape:
        raise CheckpointError(f"state: {name} has shape {tuple(saved.shape)}, not {tuple(now.shape)}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 62
