"""From a call of an operation to the backend that does it, and what every backend may then rely on.

Lists go place by place and are equally long, nothing that is written overlaps anything else, tensors that lie in memory
alike are flat, and autograd is told what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlur import backends
from fastlur.errors import ArgumentError
from fastlur.memory import flattened, refuse_overlaps
from fastlur.operands import Operand, fit, fit_scalars

_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Signature:
    """What a schema says: lists of tensors come first, scalars after them.

    Args:
        name: of the operation.
        lists: the lists of tensors.
        scalars: names of the other arguments.
        written: places of the arguments that are written.
    """

    name: str
    lists: tuple[Operand, ...]
    scalars: tuple[str, ...]
    written: tuple[int, ...]

    @classmethod
    def of(cls, name: str, schema: str) -> Signature:
        """Read it from "(Tensor(a!)[] out, Tensor[]? theta, …) -> …"."""
        parts = schema[1 : schema.index(") ->")].split(", ")
        lists = [part for part in parts if "[]" in part]
        operands = tuple(Operand(part.split()[1], "?" in part, "!" in part) for part in lists)
        scalars = tuple(part.split()[1] for part in parts[len(lists) :])
        return cls(name, operands, scalars, tuple(place for place, part in enumerate(parts) if "!" in part))


def call(signature: Signature, *arguments: Any) -> Any:
    """Do an operation on lists and scalars as the schema wants them, after a look at them.

    Raises:
        ArgumentError: they do not fit each other, or overlap.
    """
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not traced:
        served, result = _at_once(signature, arguments)
        if served:
            return result
    count = len(signature.lists)
    fit(signature.lists, arguments[:count])
    fit_scalars(arguments[0], signature.scalars, arguments[count:])
    if not traced and type(_first(arguments)) in _PLAIN:
        return _serve(signature, arguments)
    # operations work on finished gradients and on weights as values: nothing of this is differentiated
    values = [None if each is None else [x.detach() for x in each] for each in arguments[:count]]
    return getattr(torch.ops.fastlur, signature.name)(*values, *arguments[count:])


def _at_once(signature: Signature, arguments: Sequence[Any]) -> tuple[bool, Any]:
    """Whether the extension did it on the CPU, and its result.

    It looks at its operands itself before it writes, in a fraction of the time that Python takes; what it refuses goes
    the long way, where it is made to fit or the fault is named.
    """
    first = _first(arguments)
    if type(first) not in _PLAIN or not first.is_cpu or not first.is_contiguous():
        return False, None
    if torch._C._are_functorch_transforms_active() or backends.resolve("cpu")[0] != "extension":
        return False, None
    try:
        written = [tensor for place in signature.written for tensor in _tensors(arguments[place])]
        if any(map(Tensor.is_inference, written)):
            return False, None
        with torch.no_grad():
            result = getattr(torch.ops.fastlur_ext, signature.name)(*arguments)
    except (RuntimeError, TypeError):
        return False, None
    increment_version(written)
    return True, result


def serve(signature: Signature, *arguments: Any) -> Any:
    """What the registered operation does, whoever called it: a kernel would read past the end of a list too short.

    Raises:
        ArgumentError: lists of different lengths, memory that overlaps, or something written that may not be.
    """
    for operand, each in zip(signature.lists, arguments, strict=False):
        if each is not None and len(each) != len(arguments[0]):
            first = f"{signature.lists[0].name} has {len(arguments[0])}"
            raise ArgumentError(f"{operand.name} has {len(each)} tensors, {first}")
    return _serve(signature, arguments)


def _serve(signature: Signature, arguments: Sequence[Any]) -> Any:
    count = len(signature.lists)
    first = _first(arguments)
    written = [tensor for place in signature.written for tensor in _tensors(arguments[place])]
    if any(map(Tensor.is_inference, written)) and not torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{signature.name}: a tensor that it writes was made in inference mode; make it outside, or write a clone()"
        )
    with torch.no_grad():  # on finished gradients, as any optimizer works: nothing here is differentiated
        lists = flattened(arguments[:count])
        if written:
            # scalars are float64: they are part of a vector only if that is
            beside = arguments[count:] if count and first.dtype == torch.float64 else ()
            refuse_overlaps(signature.lists, lists, [each for each in beside if isinstance(each, Tensor)])
        _, module = backends.resolve("cpu" if first is None else first.device.type)
        result = getattr(module, signature.name)(*lists, *arguments[count:])
    # Triton writes behind autograd's back, and plain torch may leave out what the schema says is written
    increment_version([tensor for tensor in written if not tensor.is_inference()])
    return result


def _tensors(argument: Any) -> Sequence[Tensor]:
    return [argument] if isinstance(argument, Tensor) else argument or ()


def _first(arguments: Sequence[Any]) -> Any:
    """The first tensor there is, in a list or alone."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, list | tuple) and argument:
            return argument[0]
    return None
