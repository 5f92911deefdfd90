"""Which parameters a loss depends on, told before a run from the graph that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from fastlur.errors import ModelError
from fastlur.graph import nodes

NAMED = 4  # parameters that a message names
OPAQUE = "CheckpointFunctionBackward"
REENTRANT = (
    "model: its gradient checkpointing is the reentrant one, which cannot be differentiated for some parameters alone; "
    'switch to the other: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
)


class Reached:
    """The parameters that are to move, and those of them that some loss has been found to depend on."""

    def __init__(self, model: nn.Module, moving: list[tuple[str, nn.Parameter]]) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        for name, parameter in moving:
            self._names.setdefault(id(parameter), name)  # a tied one has several
        self._adapters = {id(p) for p in _adapters(model)} & self._names.keys()
        self._found: set[int] = set()
        self._unsure = False

    def note(self, value: Any) -> None:
        """Take up what a loss, as a model has returned it, depends on.

        Raises:
            ModelError: it depends on nothing that may move, and the model's adapters or checkpointing are why; or it
                is checkpointed in a way that cannot be differentiated in parts.
        """
        if not isinstance(value, Tensor):
            return
        if not value.requires_grad:
            if self._adapters or _checkpoints(self._model):
                raise ModelError(self._message())
            return
        for node in nodes(value):
            if node.name() == OPAQUE:
                raise ModelError(REENTRANT)
            self._unsure |= isinstance(node, BackwardCFunction)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                self._found.add(id(leaf))
        if value.grad_fn is None:
            self._found.add(id(value))

    def arrived(self, parameter: nn.Parameter) -> None:
        """Take up that a gradient has arrived at this one."""
        self._found.add(id(parameter))

    def check(self) -> None:
        """Refuse a run that would move nothing, or in which no adapter of the model would move.

        Raises:
            ModelError: no loss depends on any of the parameters, or on any of the adapters among them.
        """
        if self._unsure:  # a function written by hand may run a backward of its own
            return
        for wanted in (set(self._names), self._adapters):
            if wanted and not wanted & self._found:
                raise ModelError(self._message(wanted))

    def _message(self, wanted: set[int] | None = None) -> str:
        names = [name for key, name in self._names.items() if key in (wanted or self._adapters or self._names)]
        some = ", ".join(names[:NAMED]) + (f", … ({len(names)})" if len(names) > NAMED else "")
        said = f"model: no loss depends on any of the parameters that are to move, {some}"
        if self._adapters:
            said = f"model: no gradient reaches its adapters, {some}"
        return f"{said}; {self._remedy()}"

    def _remedy(self) -> str:
        ways = []
        if _checkpoints(self._model):
            ways.append(
                "with gradient checkpointing and frozen embeddings call model.enable_input_require_grads(), or leave "
                'reentrant checkpointing (gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        if self._adapters:
            ways.append("see that the adapter is the active one (set_adapter), enabled (enable_adapter_layers)")
            ways.append("and not merged (unmerge_adapter)")
        return ", ".join(ways) or "check `parameters`, and detach() in the loss and the model"


def remedy_for_frozen(model: nn.Module) -> str | None:
    """What to do where nothing requires a gradient and the model has adapters; None where it has none."""
    if not any(True for _ in _adapters(model)):
        return None
    return (
        "its adapters are frozen: load them with is_trainable=True (inference_mode=False), or enable_adapter_layers() "
        "and set_adapter(…)"
    )


def _adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of low-rank and other adapters, where modules say which of their parts these are, as PEFT's do.

    Whole modules that are trained beside them (PEFT's modules_to_save) are none: they move where adapters are merged.
    """
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())
        for name in names if isinstance(names, tuple | list) else ():
            part = getattr(module, str(name), None) if name != "modules_to_save" else None
            if isinstance(part, nn.Module | nn.ParameterDict):
                yield from part.parameters()


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
