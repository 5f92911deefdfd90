"""Parameters as a model has them before it has learned anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlur.errors import ModelError
from fastlur.passes import Passes
from fastlur.space import Vector


def reinitialise(passes: Passes, out: Vector, shuffle: bool) -> None:
    """Write freshly drawn parameters into a vector of the space, and reset the buffers of the modules drawn anew.

    Every module that has `reset_parameters` draws its own. Random numbers come from torch's global generators, which
    the caller seeds; parameters that do not move stay as they are.

    Args:
        passes: of the run; its space may stand anywhere.
        out: written; θ itself is allowed.
        shuffle: what to do with a parameter that no module resets: True: shuffle the entries that it has now, which
            keeps their scale and destroys what they know; False: refuse.

    Raises:
        ModelError: a module's `reset_parameters` fails, or a parameter is reset by none and `shuffle` is False.
    """
    space = passes.space
    moving = {id(parameter) for parameter in space.leaves()}
    owners = [
        module
        for module in space.model.modules()
        if callable(getattr(module, "reset_parameters", None))
        and any(id(parameter) in moving for parameter in module.parameters(recurse=False))
    ]
    covered = {id(parameter) for module in owners for parameter in module.parameters(recurse=False)}
    left = [i for i, slot in enumerate(space.slots) if not any(id(p) in covered for p in slot.parameters)]
    if left and not shuffle:
        raise ModelError(
            f"model: no module has a reset_parameters() for {space.names[left[0]]!r}; pass a freshly made model instead"
        )
    with torch.no_grad(), space.at(out):
        for view, theta in zip(out.views, space.theta.views, strict=True):
            if view is not theta:
                view.copy_(theta)
        for module in owners:
            still = [(p, p.detach().clone()) for p in module.parameters() if id(p) not in moving]
            _reset(module)
            for parameter, value in still:
                parameter.copy_(value)
        for index in left:
            out.views[index].copy_(_shuffled(out.views[index]))


def _reset(module: nn.Module) -> None:
    try:
        module.reset_parameters()  # type: ignore[operator]
    except Exception as error:
        kind = type(module).__name__
        raise ModelError(f"model: reset_parameters() of a {kind} fails ({error}); pass a freshly made model") from error


def _shuffled(value: Tensor) -> Tensor:
    order = torch.randperm(value.numel(), device=value.device)
    return value.reshape(-1)[order].reshape(value.shape)
