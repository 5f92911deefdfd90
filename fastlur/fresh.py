"""Models made of a model: with parameters as before it had learned anything, a copy, one that only answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastlur.errors import ArgumentError, ModelError, told
from fastlur.passes import Passes
from fastlur.space import Vector


def reinitialise(passes: Passes, out: Vector, shuffle: bool) -> None:
    """Write freshly drawn parameters into a vector of the space, and reset the buffers of the modules drawn anew.

    Every module that has `reset_parameters` draws its own, and what of a parameter it leaves as it was does not count
    as drawn. Random numbers come from torch's global generators, which the caller seeds; parameters that do not move
    stay as they are.

    Args:
        passes: of the run; its space may stand anywhere.
        out: written; θ itself is allowed.
        shuffle: what to do with a parameter that no module draws: True: shuffle the entries that it has now, which
            keeps their scale and destroys what they know; False: refuse.

    Raises:
        ModelError: a module's `reset_parameters` fails, or a parameter is drawn by none and `shuffle` is False; all is
            as it was then.
    """
    space, statistics = passes.space, passes.statistics
    now = space.copy() if out is space.theta else space.theta
    buffers = statistics.copies()
    pairs = list(zip(out.views, now.views, strict=True))
    with torch.no_grad(), space.at(out):
        try:
            left = _draw(space.model, {id(parameter) for parameter in space.leaves()}, pairs)
            if left and not shuffle:
                raise ModelError(
                    f"model: no reset_parameters() draws {space.names[left[0]]!r} anew; pass a freshly made model"
                )
        except ModelError:
            for view, value in pairs:
                view.copy_(value)
            statistics.put(buffers)
            raise


def renew(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Draw some parameters of an ordinary model anew, as above; those that no module draws are shuffled.

    Raises:
        ModelError: a module's `reset_parameters` fails.
    """
    with torch.no_grad():
        pairs = [(parameter.detach(), parameter.detach().clone()) for parameter in parameters]
        _draw(model, {id(parameter) for parameter in parameters}, pairs)


def copied(model: nn.Module, name: str = "model") -> nn.Module:
    """A deep copy, also of a model that holds results of its own, as hooks that compute weights leave them behind.

    Args:
        model: it.
        name: of the argument, for the error.

    Raises:
        ModelError: it cannot be copied, as one that holds a lock or a file.
    """
    results = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    with told(ModelError, f"{name}: a {type(model).__name__} cannot be copied"):
        return copy.deepcopy(model, {id(result): result.detach().clone() for result in results})


def began(start: nn.Module | Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """A network that begins elsewhere: where the model lies, in its data types, of which the same parameters move.

    Args:
        start: with the model's parameters; copied, or, what a function makes, taken as it is, unless it is the model.
        model: of its kind.

    Raises:
        ArgumentError: it has other parameters, or none is made.
        ModelError: it cannot be copied.
    """
    if isinstance(start, nn.Module):
        made: object = copied(start, "start")
    else:
        with told(ArgumentError, "start: cannot be made"):
            made = start()
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"start: made a {type(made).__name__}, which is no torch.nn.Module")
    if any(one is other for one in made.parameters() for other in model.parameters()):
        made = copied(made, "start")
    own, theirs = dict(model.named_parameters()), dict(made.named_parameters())
    odd = [name for name in own.keys() | theirs.keys() if name not in own or name not in theirs]
    odd += [name for name in own.keys() & theirs.keys() if own[name].shape != theirs[name].shape]
    if odd:
        raise ArgumentError(
            f"start: is no model of this kind, by {min(odd)!r} and {len(odd) - 1} more parameters; where the model has "
            "adapters, give it new ones of the same form"
        )
    made.to(next(iter(own.values())).device)
    for name, parameter in theirs.items():
        parameter.requires_grad_(own[name].requires_grad)
        parameter.data = parameter.data.to(own[name].dtype)  # a checkpoint holds it as a copy of the model
    buffers = dict(model.named_buffers())
    for name, buffer in made.named_buffers():
        if name in buffers:
            buffer.data = buffer.data.to(buffers[name].dtype)
    return made


def frozen(model: nn.Module) -> nn.Module:
    """The model in eval mode, without gradients."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    return model.eval()


def _draw(model: nn.Module, wanted: set[int], pairs: list[tuple[Tensor, Tensor]]) -> list[int]:
    """Draw the wanted parameters anew; each pair is where one lives and what it was, which is shuffled if not drawn.

    Returns:
        The numbers of the pairs of which something had to be shuffled.
    """
    for live, _ in pairs:
        live.fill_(torch.nan)  # a module may have a reset_parameters() that passes over some of its parameters
    _reset_all(model, wanted)
    left = []
    for index, (live, before) in enumerate(pairs):
        missing = live.isnan()
        if bool(missing.any()):
            left.append(index)
            live.copy_(torch.where(missing, _shuffled(before), live))
    return left


def _reset_all(model: nn.Module, wanted: set[int]) -> None:
    own = [(module, list(module.parameters(recurse=False))) for module in model.modules()]
    near = next((any(id(p) in wanted for p in held) for _, held in own if held), False)
    for module, held in own:
        if held:
            near = any(id(p) in wanted for p in held)
        elif near and callable(getattr(module, "reset_running_stats", None)):
            # statistics without parameters belong to the layer registered before
            module.reset_running_stats()  # type: ignore[operator]
        if near and held and callable(getattr(module, "reset_parameters", None)):
            still = [(p, p.detach().clone()) for p in module.parameters() if id(p) not in wanted]
            _reset(module)
            for parameter, value in still:
                parameter.copy_(value)


def _reset(module: nn.Module) -> None:
    what = f"model: reset_parameters() of a {type(module).__name__} fails"
    with told(ModelError, what, "; pass a freshly made model"):
        module.reset_parameters()  # type: ignore[operator]


def _shuffled(value: Tensor) -> Tensor:
    order = torch.randperm(value.numel(), device=value.device)
    return value.reshape(-1)[order].reshape(value.shape)
