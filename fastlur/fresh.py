"""Parameters as a model has them before it has learned anything."""

from __future__ import annotations

from collections.abc import Sequence

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
    owners, covered = _owners(space.model, moving)
    left = [i for i, slot in enumerate(space.slots) if not any(id(p) in covered for p in slot.parameters)]
    if left and not shuffle:
        raise ModelError(
            f"model: no module has a reset_parameters() for {space.names[left[0]]!r}; pass a freshly made model instead"
        )
    with torch.no_grad(), space.at(out):
        for view, theta in zip(out.views, space.theta.views, strict=True):
            if view is not theta:
                view.copy_(theta)
        _reset_all(owners, moving)
        for index in left:
            out.views[index].copy_(_shuffled(out.views[index]))


def renew(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Draw some parameters of an ordinary model anew, as above; those that no module resets are shuffled.

    Raises:
        ModelError: a module's `reset_parameters` fails.
    """
    wanted = {id(parameter) for parameter in parameters}
    owners, covered = _owners(model, wanted)
    with torch.no_grad():
        _reset_all(owners, wanted)
        for parameter in parameters:
            if id(parameter) not in covered:
                parameter.copy_(_shuffled(parameter))


def _owners(model: nn.Module, wanted: set[int]) -> tuple[list[nn.Module], set[int]]:
    """The modules that can draw a wanted parameter of theirs anew, and the ids of all parameters that they hold."""
    owners = [
        module
        for module in model.modules()
        if callable(getattr(module, "reset_parameters", None))
        and any(id(parameter) in wanted for parameter in module.parameters(recurse=False))
    ]
    return owners, {id(parameter) for module in owners for parameter in module.parameters(recurse=False)}


def _reset_all(owners: list[nn.Module], wanted: set[int]) -> None:
    for module in owners:
        still = [(p, p.detach().clone()) for p in module.parameters() if id(p) not in wanted]
        _reset(module)
        for parameter, value in still:
            parameter.copy_(value)


def _reset(module: nn.Module) -> None:
    try:
        module.reset_parameters()  # type: ignore[operator]
    except Exception as error:
        kind = type(module).__name__
        raise ModelError(f"model: reset_parameters() of a {kind} fails ({error}); pass a freshly made model") from error


def _shuffled(value: Tensor) -> Tensor:
    order = torch.randperm(value.numel(), device=value.device)
    return value.reshape(-1)[order].reshape(value.shape)
