"""Generated calls of `unlearn`, `MetaStep`, `meta_gradient` and `evaluate`: what may be passed, and what must hold."""

from __future__ import annotations

import json
import tempfile
import warnings

import torch
from generated import ODD, Watch, calls, data, mlp, models, mostly, of_ours, options, tried
from helpers import blobs
from hypothesis import strategies as st

import fastlur
from fastlur.losses import BoundedForgetting, cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.stopping import TimeBudget

NAMES = sorted(METHODS)
LOSSES = [
    cross_entropy,
    negative_cross_entropy,
    BoundedForgetting(1.0),
    lambda model, batch: model(batch[0]).square().mean(),
    lambda model, batch: model(batch[0]),
    lambda model, batch: 1.0,
    lambda model, batch: None,
    lambda model, batch: torch.tensor(1.0),
    lambda model, batch: cross_entropy(model, batch) * float("nan"),
    lambda model, batch: cross_entropy(model, batch) * 1e30,
    lambda model, batch: 1 / 0,
    lambda model: 1.0,
    lambda model, batch: cross_entropy(model, batch) * torch.rand(()),
]

UNLEARN = {
    "method": [*NAMES, fastlur.LUR(gradient="exact"), fastlur.LUR(trim=Trim(0.5), mask=SaliencyMask(0.5)), "lurr"],
    "task": ["auto", "classification", "regression"],
    "loss": LOSSES,
    "forget_loss": LOSSES,
    "epochs": [0.1, 0.5],
    "batch_size": [1, 2, 4, 100, 10**9],
    "lr": [0.0, 1e-3, 0.1, 1e6],
    "schedule": ["linear", "constant", "cosine"],
    "optimizer": ["sgd", "adamw", "adam"],
    "momentum": [0.0, 0.5],
    "weight_decay": [0.0, 0.1],
    "max_grad_norm": [1e-3, 1.0],
    "parameters": [None, "*", "*bias", ["0.*"], "none.*", lambda name, p: p.dim() > 1, lambda name: True, []],
    "precision": ["fp32", "bf16"],
    "memory_format": [torch.channels_last, torch.contiguous_format],
    "deterministic": [True, False],
    "stop": [None, TimeBudget(100), [TimeBudget(1e-9)], lambda event: event.step == 1],
    "max_retain_loss_increase": [0.0, 0.1, 100.0],
    "seed": [0, 1, -5, 2**70],
    "device": [None, "cpu", torch.device("cpu"), "cuda:99", "mps", "meta"],
    "checkpoint_every": [1, 5],
    "keep_checkpoints": [True, False],
    "allow_overlap": [True, False],
    "callbacks": [(), [lambda event: None]],
}
# a length that is absurd is no hostile value but a wish; these would be granted
ENDLESS = ("steps", "epochs", "progress", "compile")


def unlearning(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    model, forget, retain = (draw(each)() for each in (models, data, data))
    chosen = {"steps": 2, "progress": False} | options(draw, UNLEARN, set(UNLEARN) - {*ENDLESS})
    if "epochs" in chosen:
        chosen.pop("steps")
    steps = []
    if isinstance(chosen.setdefault("callbacks", ()), tuple):
        chosen["callbacks"] = [lambda event: steps.append(event.step)]
    where = draw(mostly([None], ["", "kept", 5, "/dev/null/x", "a\0b"]))
    with tempfile.TemporaryDirectory() as directory:
        if where is not None:
            chosen["checkpoint"] = f"{directory}/kept" if where == "kept" else where
        result = tried(lambda: fastlur.unlearn(model, forget, retain, **chosen), model, begun=steps)
    if result is not None:
        assert result.model is model
        assert result.summary()
        json.dumps(result.history)


STEP = {
    "loss": LOSSES,
    "forget_loss": LOSSES,
    "optimizer": ["sgd", "adamw", "adam"],
    "lr": [0.0, 0.1, 1e6],
    "momentum": [0.0, 0.9],
    "weight_decay": [0.1],
    "max_grad_norm": [0.1],
    "gradient": ["exact", "secant", "first_order", "optimistic", "third_order"],
    "order": ["retain_first", "forget_first"],
    "inner_lr": [0.0, 0.1],
    "relative_inner_lr": [True],
    "forget_weight": [0.0, 2.0],
    "parameters": [None, "*", "none"],
    "precision": ["fp32", "bf16"],
    "memory_format": [torch.channels_last],
    "seed": [0, 7],
    "keep_graph": [True, False],
}
BATCHES = [
    lambda: blobs(8),
    lambda: blobs(3),
    lambda: blobs(1),
    lambda: (blobs(4)[0], torch.full((4,), 9)),
    lambda: (blobs(4)[0] * float("inf"), blobs(4)[1]),
    lambda: (blobs(4)[0][:, :2], blobs(4)[1]),
    lambda: blobs(0),
    *[lambda value=value: value for value in ODD],
]


def stepping(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    model = draw(models)()
    chosen = options(draw, STEP, STEP)
    if tried(lambda: _opened(model, chosen), model) is None:
        return
    first, batches = [blobs(8), blobs(8)], [draw(mostly(BATCHES[:2], BATCHES))() for _ in range(2)]
    outside = Watch(model)
    with warnings.catch_warnings(), fastlur.MetaStep(model, **chosen) as step:
        warnings.simplefilter("ignore")
        for pair in (first, batches):
            inside, failed = Watch(model), None
            try:
                step(*pair)
                step.load_state_dict(step.state_dict())
            except Exception as error:  # a loss and a model of the caller's raise what they like
                failed = error
            kind = "refused" if isinstance(failed, fastlur.FastlurError) else "passed on"
            assert kind == "refused" or failed is None or not of_ours(failed), repr(failed)
            calls["worked" if failed is None else kind] += 1
            assert failed is None or not (what := inside.changed()), f"{what} changed in a step that failed: {failed!r}"
    assert not (what := outside.changed(contents=False)), f"{what} changed"


def _opened(model, chosen):
    fastlur.MetaStep(model, **chosen).close()
    return True


PARAMS = [
    {"x": torch.ones(2)},
    {"x": torch.ones(2, dtype=torch.float64), "y": torch.ones(3)},
    {"x": torch.ones(0)},
    {"x": torch.ones(2, dtype=torch.int64)},
    {"x": None},
    {},
    {1: torch.ones(2)},
    {"x": torch.ones(2, requires_grad=True)},
]
FUNCTIONS = [
    lambda p: sum(v.square().sum() for v in p.values()),
    lambda p: next(iter(p.values())).sum() * 3,
    lambda p: next(iter(p.values())),
    lambda p: 1.0,
    lambda p: None,
    lambda p: torch.tensor(1.0),
    lambda p: sum(v.sum() for v in p.values()) * float("nan"),
]


def differentiating(draw):
    params = draw(mostly(PARAMS[:2], [*PARAMS, *ODD]))
    inner, outer = (draw(mostly(FUNCTIONS[:2], [*FUNCTIONS, 5, None, "f"])) for _ in range(2))
    sensible = {
        "inner_lr": [0.0, 0.1],
        "gradient": ["exact", "secant", "first_order", "optimistic", "zeroth"],
        "relative": [True, False],
        "previous": [None, {}, {"x": torch.zeros(2)}, {"z": torch.zeros(2)}],
    }
    chosen = options(draw, sensible, sensible)
    result = tried(lambda: fastlur.meta_gradient(inner, outer, params, **chosen))
    if result is not None:
        assert {name: value.shape for name, value in result.items()} == {n: v.shape for n, v in params.items()}


def evaluating(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    model = draw(models)()
    sides = {side: draw(data)() for side in ("forget", "retain", "test")}
    sensible = {"batch_size": [1, 3, 512], "seconds": [None, 0.0, 2.5], "reference": [None, mlp()]}
    chosen = options(draw, sensible, sensible)
    result = tried(lambda: fastlur.evaluate(model, **sides, **chosen), model)
    if result is not None:
        json.dumps(result.as_dict())
        assert str(result)
