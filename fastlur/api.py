"""`unlearn`: validate, assemble, run, give back."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fastlur import checks, identity, look, overlap
from fastlur._version import __version__
from fastlur.backends import serving
from fastlur.budget import RetainBudget, check_limit
from fastlur.checkpoint import Checkpoints, Found
from fastlur.checkpointer import Checkpointer
from fastlur.data import Feed, Stream
from fastlur.errors import ArgumentError, DataError, NonFiniteError
from fastlur.fingerprints import fingerprints, new_key
from fastlur.footprint import peak_memory
from fastlur.history import History
from fastlur.interrupt import Interrupt, Interrupted
from fastlur.loop import SCHEDULES, Observer, run
from fastlur.losses import cross_entropy
from fastlur.methods import METHODS, resolve
from fastlur.methods.base import Method, Recipe
from fastlur.moving import Moved
from fastlur.passes import ARGUMENT, Loss, Which
from fastlur.result import Result
from fastlur.slots import Selection, select
from fastlur.snapshot import Snapshot
from fastlur.step import Step
from fastlur.task import viewed_as
from fastlur.update import DEFAULT_LR, check_optimizer
from fastlur.world import derive, determinism, kept_modes, random_states, set_random_states


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
    micro_batch: int | None = None,
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
    keep_checkpoints: bool = False,
    allow_overlap: bool = False,
    progress: bool = True,
    callbacks: Sequence[Observer] = (),
) -> Result:
    """Make a trained model forget some data and keep the rest, in place.

    Example:
        >>> result = fastlur.unlearn(model, forget, retain)               # doctest: +SKIP
        >>> print(result.summary())                                       # doctest: +SKIP
        >>> fastlur.evaluate(model, forget=forget, retain=retain, test=test)   # doctest: +SKIP

    A step takes one batch of each side. Both are drawn without replacement and cycle independently. An *epoch* is one
    pass over the longer of the two, counted in its batches; the shorter one comes round several times meanwhile.

    Args:
        model: changed in place; comes back as it came otherwise (mode, requires_grad, ties, no gradients). Unless the
            method's docs say otherwise passes run in train mode; statistics move in one retain pass a step.
        forget: what to forget: `(inputs, targets)` tensors, a dict of tensors, a `Dataset`, a `DataLoader` (its own
            batches are used) or a re-iterable of batches.
        retain: what to keep, likewise, without the forget items.
        method: a name (see `fastlur.methods.available()`) or an instance such as `fastlur.LUR(gradient="secant")`.
        task: "classification" or "causal_lm" (text: logits speak of the next token); "auto" recognises Hugging Face's
            models, and text by labels that are the input_ids. Gives the default losses, and how they read a batch.
        loss: retain loss `(model, batch) -> scalar`, such as `fastlur.losses.own_loss`; None: cross-entropy.
        forget_loss: loss `(model, batch) -> scalar` that forgets when minimised; None: the method's own (for LUR
            `fastlur.targets.NoviceOrAscent`, which trains a teacher first). More: `fastlur.targets`.
        steps: how many steps; None (with `epochs` None too): 150, or what is usual with the method. A method that
            makes no steps (SSD) makes none whatever is asked.
        epochs: the same in epochs; fractions are allowed.
        batch_size: items of each side a step, for data that do not come in batches.
        micro_batch: items that the model takes at a time, for one more forward a pass: the same gradient up to rounding
            (dropout draws other masks) with fewer activations; None: all, until memory runs out.
        lr: learning rate; None: 0.03 for SGD, 1e-3 for AdamW, or what is usual with the method (LUR: 0.1 for SGD).
        schedule: "linear" (down to 0 at the end) or "constant".
        optimizer: "sgd", "adamw", or a `torch.optim.Optimizer`, which keeps its own learning rate.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 for SGD, decoupled for AdamW.
        max_grad_norm: clip the direction to this norm; None: what is usual with the method (LUR: 1, others: inf).
        parameters: None (all that require a gradient), globs such as "layer4.*", or `(name, parameter) -> bool`.
        precision: "fp32", or "bf16" for autocast; parameters stay as they are.
        compile: run forwards through `torch.compile`.
        memory_format: `torch.channels_last` for convolutional models; weights come back in their own format.
        deterministic: use deterministic algorithms on CUDA too (slower); the CPU is deterministic anyway.
        stop: one or more stopping rules (see `fastlur.stopping` for a target, patience, a time budget): callables that
            take a `fastlur.loop.StepEvent`; a true answer ends the run.
        max_retain_loss_increase: end the run and roll back once the retain loss, in eval mode, has risen by more than
            this over that of the model as given; the model comes back within it. None: no such guard.
        seed: fixes the order of the data and every random draw. Same seed, same machine: same result, bit for bit.
        device: move the model there, for good once the run begins; None: use it where it is. Batches follow the model.
        checkpoint: a directory; an interrupted run goes on from it, bit for bit, when the same call is made again.
            Removed at the end, since it still holds the old weights.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: leave the last two when the run is over; made again, the call then ends with that model.
        allow_overlap: go on although retain contains forget items (equal inputs and targets). Tensors in memory are
            compared whole; of data that may have to be decoded at most 5,000 items a side, with a warning.
        progress: show a bar on standard error.
        callbacks: callables that take a `fastlur.loop.StepEvent` after every step; a true answer ends the run.

    Returns:
        The `Result`: the model, the history, seconds, peak memory, `summary()` and `save(path)`.

    Raises:
        ArgumentError: an argument out of range or of an unknown name.
        ModelError: nothing to move, no loss that depends on it, or a kind of parameter that cannot be moved.
        DataError: data that are empty, overlap, are not finite, or do not fit the model or a loss.
        CheckpointError: the checkpoint is of another run, damaged, or cannot be written.
        NonFiniteError: a loss or gradient was not finite, or an update would overflow; the model is as before it.
        The first three are raised before a parameter changes, but for what only a later batch or look of a stopping
        rule shows; the model is then that of the last whole step. All are `fastlur.FastlurError`.
    """
    began, history = time.perf_counter(), History()
    checks.module(model)
    checks.losses(loss=loss, forget_loss=forget_loss)
    if forget is retain:
        raise DataError("retain: is the same object as forget; pass the data to keep, without those to forget")
    method = resolve(method)
    checks.length(steps, epochs)
    few = batch_size if micro_batch is None else micro_batch
    checks.positive_ints(batch_size=batch_size, checkpoint_every=checkpoint_every, micro_batch=few)
    checks.flags(compile, deterministic, keep_checkpoints, allow_overlap, progress)
    checks.memory_format(memory_format)
    checks.one_of("schedule", schedule, SCHEDULES)
    checks.seed(seed)
    check_optimizer(optimizer)
    moving, held = select(model, parameters), identity.model_settings(model)
    rules: list[Observer] = [stop] if callable(stop) else list(checks.callables("stop", stop))
    callbacks = checks.callables("callbacks", callbacks)
    checks.path("checkpoint", checkpoint)
    if max_retain_loss_increase is not None:
        check_limit(max_retain_loss_increase, loss)
    budget: RetainBudget | None = None
    checkpoints: Checkpoints | None = None
    found: Found | None = None
    kept: Checkpointer | None = None
    ended: str | None = None
    with ExitStack() as stack:
        moved = stack.enter_context(Moved(model, device))
        where = next(model.parameters()).device
        sources, contents, firsts = look.look_at_data(forget, retain, batch_size, seed, where)
        if not allow_overlap:
            overlap.check(forget, retain, contents["forget"], contents["retain"])
        default: dict[Which, bool] = {"forget": forget_loss is None, "retain": loss is None}
        evaluated = checks.evaluated(method)
        labelled = [side for side, of in evaluated if default[of]]
        kind = stack.enter_context(viewed_as(look.task_of(task, model, firsts, labelled, method)))
        forgetting = forget_loss or method.default_forget_loss(kind)
        losses: dict[Which, Loss] = {"retain": loss or cross_entropy, "forget": forgetting}
        how = checks.How(where, precision, getattr(method, "training", True))
        tried = [checks.Tried(side, ARGUMENT[of], losses[of], default[of]) for side, of in evaluated]
        rows = checks.trial(model, tried, firsts, contents, how, moving, micro_batch)
        if forget_loss is not None and getattr(method, "own_objective", False):
            raise ArgumentError(
                f"forget_loss: {method.name} defines what it minimises on the forget data; leave it None"
            )
        total = look.length(sources, steps, epochs, getattr(method, "steps", None))
        if lr is not None and not isinstance(optimizer, str):
            raise ArgumentError(f"lr={lr!r}: the optimizer that was passed keeps its own; set it there")
        usual = DEFAULT_LR | getattr(method, "rates", {})
        base = lr if lr is not None else usual.get(str(optimizer), 0.0)
        clip = checks.clipping(method, max_grad_norm)
        checks.numbers(base, momentum, weight_decay, clip, precision)
        settings = {
            "fastlur": __version__,
            "torch": torch.__version__,
            "method": {"name": getattr(method, "name", type(method).__name__), **method.settings()},
            "task": kind,
            "steps": total,
            "batch_size": batch_size,
            "lr": base,
            "schedule": schedule,
            "optimizer": identity.optimizer_settings(optimizer),
            "momentum": momentum,
            "weight_decay": weight_decay,
            "max_grad_norm": clip,
            "precision": precision,
            "micro_batch": micro_batch,
            "max_retain_loss_increase": max_retain_loss_increase,
            "stop": [identity.name_of(rule) for rule in rules],
            "seed": seed,
            "device": str(where),
            "backend": serving(where.type),
            "loss": identity.name_of(losses["retain"]),
            "forget_loss": identity.name_of(losses["forget"]),
            "memory_format": str(memory_format),
            "compile": compile,
            "deterministic": deterministic,
        }
        stack.enter_context(kept_modes(model))
        stack.enter_context(determinism(deterministic))
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        if checkpoint is not None:
            look.warn_of_unread(contents)
            same = look.same_run(model, method, losses, rules, optimizer, parameters, sources, contents, held)
            if max_retain_loss_increase is not None:
                same["checkpoint_every"] = checkpoint_every  # the budget looks then as well
            checkpoints = Checkpoints(checkpoint, settings | same)
            stack.callback(checkpoints.close)
            found = checkpoints.newest()
        if max_retain_loss_increase is not None:
            budget = RetainBudget(
                model,
                losses["retain"],
                look.probes(sources["retain"], seed, where, memory_format),
                max_retain_loss_increase,
                checkpoint_every,
                parameters,
                finishes=getattr(type(method), "finish", None) is not Recipe.finish,
            )
        # one from elsewhere may write to the weights without saying so
        named = type(method) in METHODS.values() and getattr(method, "trim", None) is None
        given = Snapshot(model, parameters) if not named or getattr(method, "rewrites", True) else None
        try:
            step = stack.enter_context(
                Step(
                    model,
                    method,
                    losses,
                    optimizer=optimizer,
                    lr=base,
                    momentum=momentum,
                    weight_decay=weight_decay,
                    max_grad_norm=clip,
                    parameters=parameters,
                    precision=precision,
                    memory_format=memory_format,
                    compile=compile,
                    seed=seed,
                    feed=Feed(sources, seed, where, memory_format),
                    steps=total,
                    rows=rows,
                    target=None if checkpoints is None or found is None else checkpoints.target(found),
                )
            )
            done = 0 if found is None else int(found.record["step"])
            streams = {side: Stream(sources[side], derive(seed, side), skip=done) for side in look.SIDES}
            for stream in streams.values():
                stack.callback(stream.close)
            observers = [*callbacks, *rules]
            interrupt = stack.enter_context(Interrupt())
            if checkpoints is not None:
                how_often = checkpoint_every, total, keep_checkpoints
                kept = Checkpointer(checkpoints, step, history, streams, observers, budget, *how_often, began)
                if found is not None:
                    stack.callback(set_random_states, random_states())  # callbacks go on with the run's, ours stay
                    ended = kept.resume(found)
        except BaseException:
            if given is not None:
                given.put_back()
            raise
        moved.keep()
        del given
        try:
            if ended is None:
                ended = run(
                    step,
                    streams["forget"],
                    streams["retain"],
                    steps=total,
                    lr=lambda t: base * SCHEDULES[schedule](t, total),
                    history=history,
                    observers=[each for each in (budget, *observers, kept) if each is not None],
                    progress=progress,
                    interrupted=lambda: interrupt.pending,
                )
                over = budget.last() if budget is not None and not budget.finishes else None
                ended = over or ended
                if kept is not None:
                    kept.over(ended, put_back=over is not None)  # what a repeat brings back is within the budget
            step.finish()
        except (Interrupted, NonFiniteError) as error:
            if kept is not None:
                kept.broken_off(error)
            raise
        if budget is not None and budget.finishes:
            ended = budget.last() or ended
        keep = keep_checkpoints or interrupt.pending  # after Ctrl-C nothing is returned, and they are all there is
        settings["checkpoints_kept"] = checkpoints is not None and (keep or not checkpoints.purge())
    settings["micro_batch"] = step.passes.spare.rows
    settings["forget_target"] = identity.name_of(step.passes.losses["forget"])
    settings["parameters_moved"] = sum(slot.numel for slot in step.space.slots)
    settings["parameters_total"] = sum(parameter.numel() for parameter in model.parameters())
    settings["method"] = identity.without_hashes(settings["method"])
    key = new_key()
    data = {str(side): fingerprints(contents[side], side, key) for side in look.SIDES}
    seconds = time.perf_counter() - began + (0.0 if kept is None else kept.before)
    caveat, digest = getattr(method, "caveat", ""), identity.state_digest(model)
    return Result(model, history, seconds, peak_memory(where), ended, settings, data, key, caveat, digest)
