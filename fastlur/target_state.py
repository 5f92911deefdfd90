"""A target that was made from a model and its data, as plain values and tensors by name, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlur.answers import Answers
from fastlur.fresh import copied, frozen
from fastlur.losses import BoundedForgetting
from fastlur.passes import Loss, Passes
from fastlur.targets import Imitation, Novice, NoviceOrAscent, SecondChoice

ANSWERS = ("keys", "begins", "sizes", "logits")
OURS = (SecondChoice, Novice, NoviceOrAscent)


def saved(loss: Loss, made: Loss) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What a target is brought back from: plain values and tensors; None for a loss that is none of `OURS`.

    Args:
        loss: what the run was given.
        made: what it has made of itself.
    """
    if type(loss) not in OURS:
        return None, {}  # one of the caller's own making is made again, as it was the first time
    if not isinstance(made, Imitation):
        return {"kind": "ascent"}, {}
    told = made.settings()
    if isinstance(made.teacher, Answers):
        return {"kind": "answers", **told}, {name: getattr(made.teacher, name) for name in ANSWERS}
    return {"kind": "imitation", **told}, {
        **dict(made.teacher.named_parameters()),
        **dict(made.teacher.named_buffers()),
    }


def brought_back(kept: dict[str, Any], tensors: dict[str, Tensor], passes: Passes) -> Loss:
    """The target that `saved` spoke of, as it was: nothing is trained again, and no random number drawn.

    Raises:
        ValueError: it does not fit the model, or is no target.
    """
    if kept["kind"] == "ascent":
        return BoundedForgetting()
    if kept["kind"] == "answers":
        answers = _answers(tensors, passes.space.device)
        return Imitation(answers, **_settings(kept))
    if kept["kind"] != "imitation":
        raise ValueError(f"{kept['kind']!r} is no kind of target")
    teacher = copied(passes.space.model)
    parameters = dict(teacher.named_parameters())
    if not set(parameters) <= set(tensors):
        raise ValueError("its target is of another model")
    with torch.no_grad():
        for name, tensor in tensors.items():
            owner, _, last = name.rpartition(".")
            module, now = teacher.get_submodule(owner), parameters.get(name)
            if now is None:
                if last not in module._buffers:
                    raise ValueError(f"its target has a {name!r}, the model has not")
                module._buffers[last] = tensor.to(passes.space.device)  # a module of the caller's may let it grow
            elif (tensor.shape, tensor.dtype) != (now.shape, now.dtype):
                raise ValueError(f"the {name!r} of its target is {tensor.dtype} of shape {tuple(tensor.shape)}")
            else:
                now.copy_(tensor)
    return Imitation(frozen(teacher), **_settings(kept))


def _settings(kept: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an `Imitation` but for its teacher."""
    found = {name: kept[name] for name in ("sharpness", "weight", "temperature")}
    return found | {"without_truth": bool(kept["without_truth"])}


def _answers(tensors: dict[str, Tensor], device: torch.device) -> Answers:
    if set(tensors) != set(ANSWERS):
        raise ValueError("its target has no answers")
    *where, logits = (tensors[name] for name in ANSWERS)
    keys, begins, sizes = where
    whole = all(each.dtype == torch.int64 and each.dim() == 1 and len(each) == len(keys) for each in where)
    if not (whole and logits.is_floating_point() and logits.dim() == 2 and len(keys) and len(logits)):
        raise ValueError("its target's answers are not of their shapes and types")
    inside = bool(((begins >= 0) & (sizes >= 0) & (begins + sizes <= len(logits))).all())
    if not (inside and bool((keys[1:] >= keys[:-1]).all())):
        raise ValueError("its target's answers are in no order")
    return Answers(*(each.to(device) for each in (keys, begins, sizes, logits)))
