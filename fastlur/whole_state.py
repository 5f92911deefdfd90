"""The whole state of a run after a step, as plain values and tensors by name, and back.

What belongs to the step, to the model's buffers, to the random generators, and the target that the forget loss was made
into. Where it is kept is no matter here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlur.interrupt import Whole
from fastlur.packing import pack, unpack
from fastlur.step import Step
from fastlur.target_state import saved
from fastlur.world import random_states, set_random_states

PLAIN = ("step", "rows", "lent", "method")  # of a step's own state


def gathered(step: Step) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain values, which JSON holds, and tensors by name, on the host; to be written before a step changes them."""
    state, space = step.state_dict(), step.space
    tensors = {f"buffer/{k}": v.detach().clone() for k, v in space.model.named_buffers()}
    tensors |= {f"weight/{k}": v for k, v in zip(space.names, space.theta.views, strict=True)}
    for vector, named in state["vectors"].items():
        tensors |= {f"vector/{vector}/{name}": tensor for name, tensor in named.items()}
    tensors |= {f"method/{name}": tensor for name, tensor in state["tensors"].items()}
    tensors["control"] = state["control"]
    target, teacher = saved(step.given["forget"], step.passes.losses["forget"])
    tensors |= {f"target/{name}": tensor for name, tensor in teacher.items()}
    record = {name: state[name] for name in PLAIN} | {
        "forget_target": target,
        "vectors": sorted(state["vectors"]),
        "optimizer": pack(state["optimizer"], "optimizer", tensors),
        "random": pack(random_states(), "random", tensors),
    }
    return record, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def put_back(step: Step, record: dict[str, Any], tensor: Callable[[str], Tensor], names: set[str]) -> None:
    """Bring a step to where it was. Everything is read and compared first; then it is written without a break.

    Args:
        step: a step of the same run, before its first.
        record: the plain values of `gathered`.
        tensor: gives a tensor of `gathered` by its name.
        names: of all of them.

    Raises:
        ValueError: something does not fit; the model is as it was. (Or another of `checkpoint.DAMAGE`.)
        CheckpointError: likewise, of the step's own state.
    """
    space = step.space
    weights = [tensor(f"weight/{name}") for name in space.names]
    for name, kept, view in zip(space.names, weights, space.theta.views, strict=True):
        if (kept.shape, kept.dtype) != (view.shape, view.dtype):
            raise ValueError(f"weight {name!r} is {kept.dtype} of shape {tuple(kept.shape)}")
    prefix = "buffer/"
    buffers = {name.removeprefix(prefix): tensor(name) for name in names if name.startswith(prefix)}
    for name in buffers:
        owner, _, last = name.rpartition(".")
        module = space.model.get_submodule(owner)
        if last not in module._buffers and hasattr(module, last):
            raise ValueError(f"{name!r} is no buffer of the model")
        now, kept = module._buffers.get(last), buffers[name]
        grows = not type(module).__module__.startswith("torch.")  # a module of the caller's may
        if now is not None and (kept.dtype != now.dtype or not (grows or kept.shape == now.shape)):
            raise ValueError(f"buffer {name!r} is {kept.dtype} of shape {tuple(kept.shape)}")
    vectors = {
        vector: {name: tensor(f"vector/{vector}/{name}") for name in space.names} for vector in record["vectors"]
    }
    own = {name.removeprefix("method/"): tensor(name) for name in names if name.startswith("method/")}
    state = {"control": tensor("control"), **{name: record[name] for name in PLAIN}}
    optimizer = unpack(record["optimizer"], tensor)
    random = unpack(record["random"], tensor)
    there: dict[str, Tensor | None] = dict.fromkeys(dict(space.model.named_buffers()))
    there |= {name: value.to(space.device) for name, value in buffers.items()}
    with Whole(), torch.no_grad():
        set_random_states(random)
        step.load_state_dict(state | {"vectors": vectors, "tensors": own, "optimizer": optimizer})
        for kept, view in zip(weights, space.theta.views, strict=True):
            view.copy_(kept)
        step.passes.statistics.take(there)
