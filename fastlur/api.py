"""`unlearn`: validate, assemble, run, give back."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import nn

from fastlur import checks, content, overlap
from fastlur._version import __version__
from fastlur.backends import serving
from fastlur.budget import RetainBudget
from fastlur.checkpoint import Checkpointer, model_digest
from fastlur.data import Feed, Source, Stream, source, to_device
from fastlur.errors import ArgumentError, DataError, ModelError
from fastlur.history import History
from fastlur.loop import Observer, run
from fastlur.losses import cross_entropy
from fastlur.methods import resolve
from fastlur.methods.base import Method
from fastlur.passes import Loss, Which
from fastlur.result import Result
from fastlur.slots import Selection, select
from fastlur.step import Step
from fastlur.world import borrowed_random, derive, determinism, kept_modes, seed_loading

STEPS = 150
DEFAULT_LR = {"sgd": 0.03, "adamw": 1e-3}
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, steps: 1 - step / steps,
    "constant": lambda step, steps: 1.0,
}
PROBES = 8  # retain batches that a retain budget is measured on
SIDES: tuple[Which, Which] = ("forget", "retain")


@torch.inference_mode(False)
def unlearn(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    method: str | Method = "lur",
    task: str = "auto",
    loss: Loss | None = None,
    forget_loss: Loss | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    schedule: str = "linear",
    optimizer: str | torch.optim.Optimizer = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    parameters: Selection = None,
    precision: str = "fp32",
    compile: bool = False,
    memory_format: torch.memory_format | None = None,
    deterministic: bool = False,
    stop: Observer | Sequence[Observer] | None = None,
    max_retain_loss_increase: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    allow_overlap: bool = False,
    progress: bool = True,
    callbacks: Sequence[Observer] = (),
) -> Result:
    """Make a trained model forget some data and keep the rest, in place.

    Example:
        >>> result = fastlur.unlearn(model, forget, retain)               # doctest: +SKIP
        >>> print(result.summary())                                       # doctest: +SKIP
        >>> fastlur.evaluate(model, forget=forget, retain=retain, test=test)   # doctest: +SKIP

    A step takes one batch of each side. Both are drawn without replacement and cycle independently, whatever their
    lengths. An *epoch* is one pass over the longer of the two, counted in its batches; the shorter one comes round
    several times meanwhile.

    Args:
        model: changed in place; comes back as it came otherwise (mode, requires_grad, ties, no gradients). All passes
            run in train mode, batch norm included; its statistics move in one retain pass a step.
        forget: what to forget: `(inputs, targets)` tensors, a dict of tensors, a `Dataset`, a `DataLoader` (its own
            batches are used) or a re-iterable of batches.
        retain: what to keep, likewise, without the forget items.
        method: a name (see `fastlur.methods.available()`) or an instance such as `fastlur.LUR(gradient="secant")`.
        task: "auto" or "classification"; gives the default losses.
        loss: retain loss `(model, batch) -> scalar`; None: cross-entropy.
        forget_loss: loss `(model, batch) -> scalar` that forgets when minimised; None: the method's own (for LUR
            `fastlur.losses.BoundedForgetting`).
        steps: how many steps; None (with `epochs` None too): 150, or what is usual with the method. A method that
            makes no steps (SSD) makes none whatever is asked.
        epochs: the same in epochs; fractions are allowed.
        batch_size: items of each side a step, for data that do not come in batches.
        lr: learning rate; None: 0.03 for SGD, 1e-3 for AdamW, or what is usual with the method.
        schedule: "linear" (down to 0 at the end) or "constant".
        optimizer: "sgd", "adamw", or a `torch.optim.Optimizer`, which keeps its own learning rate.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 for SGD, decoupled for AdamW.
        max_grad_norm: clip the direction to this norm.
        parameters: None (all that require a gradient), globs such as "layer4.*", or `(name, parameter) -> bool`.
        precision: "fp32", or "bf16" for autocast; parameters stay as they are.
        compile: run forwards through `torch.compile`.
        memory_format: `torch.channels_last` for convolutional models; weights come back in their own format.
        deterministic: use deterministic algorithms on CUDA too (slower); the CPU is deterministic anyway.
        stop: one or more stopping rules: callables that take a `fastlur.loop.StepEvent`; a true answer ends the run.
        max_retain_loss_increase: end the run and roll back once the retain loss, in eval mode, has risen by more than
            this; None: no such guard.
        seed: fixes the order of the data and every random draw. Same seed, same machine: same result, bit for bit.
        device: move the model there first; None: use it where it is. Batches follow the model.
        checkpoint: a directory; an interrupted run goes on from it, bit for bit, when the same call is made again.
            Removed at the end, since it still holds the old weights.
        checkpoint_every: steps between two checkpoints.
        allow_overlap: go on although retain contains forget items (equal inputs and targets). Tensors in memory are
            compared whole; of data that may have to be decoded at most 5,000 items a side, with a warning.
        progress: show a bar on standard error.
        callbacks: callables that take a `fastlur.loop.StepEvent` after every step; a true answer ends the run.

    Returns:
        The `Result`: the model, the history, seconds, peak memory, `summary()` and `save(path)`.

    Raises:
        ArgumentError: an argument out of range or of an unknown name.
        ModelError: nothing to move, or a kind of parameter that cannot be moved.
        DataError: data that are empty, overlap, are not finite, or do not fit the model or a loss.
        CheckpointError: the checkpoint is of another run, damaged, or cannot be written.
        NonFiniteError: a loss or gradient was not finite during the run; the model is as at the last good step.
        The first three are raised before a parameter changes. All are `fastlur.FastlurError`.
    """
    began = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: a {type(model).__name__} is no torch.nn.Module")
    if forget is retain:
        raise DataError("retain: is the same object as forget; pass the data to keep, without those to forget")
    method = resolve(method)
    checks.length(steps, epochs)
    checks.positive_int("batch_size", batch_size)
    checks.positive_int("checkpoint_every", checkpoint_every)
    checks.one_of("schedule", schedule, SCHEDULES)
    if not isinstance(seed, int):
        raise ArgumentError(f"seed={seed!r} must be a whole number")
    select(model, parameters)
    rules: list[Observer] = [stop] if callable(stop) else list(checks.callables("stop", stop))
    callbacks = checks.callables("callbacks", callbacks)
    checks.path("checkpoint", checkpoint)
    if device is not None:
        checks.move(model, device)
    where = next(model.parameters()).device
    sources, contents, firsts = _look_at_data(forget, retain, batch_size, seed, where)
    if not allow_overlap:
        overlap.check(forget, retain, contents["forget"], contents["retain"])
    uses_forget = getattr(method, "uses_forget", True)
    classifies: dict[Which, bool] = {"forget": forget_loss is None and uses_forget, "retain": loss is None}
    kind = checks.task_of(task, firsts) if any(classifies.values()) else task
    losses: dict[Which, Loss] = {
        "retain": loss or cross_entropy,
        "forget": forget_loss or method.default_forget_loss(kind),
    }
    tried: dict[Which, Loss] = losses if uses_forget else {"retain": losses["retain"]}
    checks.trial(model, tried, firsts, contents, classifies=classifies, device=where, precision=precision)
    if forget_loss is not None and getattr(method, "own_objective", False):
        raise ArgumentError(f"forget_loss: {method.name} defines what it minimises on the forget data; leave it None")
    total = _length(sources, steps, epochs, getattr(method, "steps", None))
    if lr is not None and not isinstance(optimizer, str):
        raise ArgumentError(f"lr={lr!r}: the optimizer that was passed keeps its own; set it there")
    usual = DEFAULT_LR | getattr(method, "rates", {})
    base = lr if lr is not None else usual.get(str(optimizer), 0.0)

    settings = {
        "fastlur": __version__,
        "torch": torch.__version__,
        "method": {"name": getattr(method, "name", type(method).__name__), **method.settings()},
        "steps": total,
        "batch_size": batch_size,
        "lr": base,
        "schedule": schedule,
        "optimizer": optimizer if isinstance(optimizer, str) else type(optimizer).__name__,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "precision": precision,
        "max_retain_loss_increase": max_retain_loss_increase,
        "seed": seed,
        "device": str(where),
        "backend": serving(where.type),
        "loss": _name(losses["retain"]),
        "forget_loss": _name(losses["forget"]),
        "memory_format": str(memory_format),
        "compile": compile,
        "deterministic": deterministic,
    }
    history = History()
    budget: RetainBudget | None = None
    kept: Checkpointer | None = None
    with ExitStack() as stack:
        stack.enter_context(kept_modes(model))
        stack.enter_context(determinism(deterministic))
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        step = stack.enter_context(
            Step(
                model,
                method,
                losses,
                optimizer=optimizer,
                lr=base,
                momentum=momentum,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                parameters=parameters,
                precision=precision,
                memory_format=memory_format,
                compile=compile,
                seed=seed,
                feed=Feed(sources, seed, where, memory_format),
                steps=total,
            )
        )
        guards: list[Observer] = []
        if max_retain_loss_increase is not None:
            probes = _probes(sources["retain"], seed, where, memory_format)
            budget = RetainBudget(step.space, losses["retain"], probes, max_retain_loss_increase, checkpoint_every)
            guards.append(budget)
        if checkpoint is not None:
            identity: dict[str, Any] = {f"{side} data": contents[side].digest for side in SIDES}
            identity |= {"model": model_digest(model), "moving parameters": step.space.names}
            kept = Checkpointer(checkpoint, settings | identity, step, history, budget, checkpoint_every)
            guards.append(kept)
        streams = {side: Stream(sources[side], derive(seed, side), skip=step.step) for side in SIDES}
        for stream in streams.values():
            stack.callback(stream.close)
        ended = run(
            step,
            streams["forget"],
            streams["retain"],
            steps=total,
            lr=lambda t: base * SCHEDULES[schedule](t, total),
            history=history,
            observers=[*guards, *callbacks, *rules],
            progress=progress,
        )
        step.finish()
        if kept is not None:
            kept.purge()
    return Result(model, history, time.perf_counter() - began, _peak_memory(where), ended, settings)


Looked = tuple[dict[Which, Source], dict[Which, content.Content], dict[Which, Any]]


def _look_at_data(forget: Any, retain: Any, batch_size: int, seed: int, device: torch.device) -> Looked:
    """Both sides as sources, what they hold, and the first batch of each."""
    sources: dict[Which, Source] = {
        "forget": source(forget, "forget", batch_size),
        "retain": source(retain, "retain", batch_size),
    }
    contents: dict[Which, content.Content] = {}
    firsts: dict[Which, Any] = {}
    with borrowed_random(device):
        for side in SIDES:
            contents[side] = content.read(sources[side], side, derive(seed, "look", side))
            stream = Stream(sources[side], derive(seed, side))
            try:
                firsts[side] = next(stream)
            finally:
                stream.close()
    return sources, contents, firsts


def _probes(retain: Source, seed: int, device: torch.device, memory_format: torch.memory_format | None) -> list[Any]:
    """The fixed retain batches that a retain budget is measured on."""
    with borrowed_random(device):
        seed_loading(derive(seed, "budget"))
        return [to_device(batch, device, memory_format) for batch in islice(retain.once(), PROBES)]


def _name(loss: Loss) -> str:
    """What tells a loss from another in a record: its settings where it shows them, else where it was defined."""
    if not hasattr(loss, "__qualname__") and "__repr__" in vars(type(loss)):
        return repr(loss)
    owner: Any = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{owner.__module__}.{owner.__qualname__}"


def _length(sources: dict[Which, Source], steps: int | None, epochs: float | None, usual: int | None) -> int:
    """How many steps: as asked for, or what is usual with the method; 0 for a method without steps, always."""
    if usual == 0:
        return 0
    if epochs is None:
        return steps or usual or STEPS
    counts = [source.per_epoch for source in sources.values()]
    if None in counts:
        raise ArgumentError(f"epochs={epochs!r}: the data do not tell their length; give steps= instead")
    return max(1, math.ceil(epochs * max(count for count in counts if count is not None)))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on every platform
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
