"""Generated methods, operations, losses, rules and components: what may be passed, and what must hold."""

from __future__ import annotations

import dataclasses
import json

import torch
from generated import ODD, Items, calls, mlp, mostly, odd, options, small, tried
from helpers import blobs
from hypothesis import strategies as st
from torch import nn

import fastlur
from fastlur import ops
from fastlur.losses import BoundedForgetting, cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.operands import control_scalars, hyper_parameters
from fastlur.stopping import ErrorOn, LossOn, Patience, Reached, TimeBudget

NAMES = sorted(METHODS)


def choosing_methods(draw):
    kind = METHODS[draw(st.sampled_from(NAMES))]
    names = [each.name for each in dataclasses.fields(kind)]
    changed = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    chosen = {name: draw(st.one_of(small, odd)) for name in changed}
    method = tried(lambda: kind(**chosen))
    if method is None:
        return
    json.dumps(method.settings())
    assert str(method.cost)
    torch.manual_seed(1)
    model, sides, options = mlp(), (blobs(9), blobs(20)), {"steps": 1, "batch_size": 8, "progress": False}
    tried(lambda: fastlur.unlearn(model, *sides, method=method, **options), model)


def naming_methods(draw):
    word = draw(st.one_of(st.sampled_from(NAMES), odd, st.text(max_size=8)))
    found = tried(lambda: fastlur.methods.resolve(word))
    assert found is None or callable(found.direction)
    preset = draw(st.one_of(odd, st.sampled_from(["cifar10", "llm", "svhn"]), st.text(max_size=4)))
    arguments = tried(lambda: fastlur.methods.preset(word, preset))
    assert arguments is None or "method" in arguments
    assert fastlur.methods.available()


def vectors(draw):
    tensors = [
        torch.rand(4),
        torch.rand(2, 3),
        torch.rand(0),
        torch.rand(4, dtype=torch.float64),
        torch.rand(4).half(),
        torch.arange(4),
        torch.rand(3, 2).t(),
        torch.rand(4) > 0.5,
        torch.full((4,), float("nan")),
    ]
    if draw(st.integers(0, 5)) == 5:
        return draw(odd)
    usual = [torch.rand(4), torch.rand(2, 3)]
    return usual if draw(st.booleans()) else draw(st.lists(st.sampled_from(tensors), max_size=3))


OPERATIONS = {
    "grad_dot": (["a", "b"], {}),
    "displace": (["out", "theta", "d"], {"alpha": [0.1, torch.tensor(0.1)], "norm2": [None, torch.tensor(2.0)]}),
    "project": (["a", "b"], {"dots": [torch.rand(3).double()], "kind": ["one_sided", "symmetric", "scissorhands"]}),
    "regularize": (["grad", "theta", "theta0", "fisher"], {"l2": [0.1], "l1": [0.1], "prox": [0.1]}),
    "meta_update": (
        ["theta", "a", "u", "moment1", "moment2", "theta0", "fisher", "mask"],
        {"control": [control_scalars("cpu")], "hyper": [hyper_parameters("cpu", lr=0.1)]},
    ),
    "extrapolate": (["theta", "theta0", "memorised"], {"alpha": [2.0], "eta": [0.5, 1.0]}),
    "saliency": (["out", "grad", "theta"], {}),
    "threshold": (["scores"], {"sparsity": [0.0, 0.3, 1.0]}),
    "step_control": (
        [],
        {
            "control": [control_scalars("cpu")],
            "dots": [torch.rand(3).double()],
            "losses": [torch.rand(2)],
            "hyper": [hyper_parameters("cpu", lr=0.1)],
        },
    ),
}


def operating(draw):
    name = draw(st.sampled_from(sorted(OPERATIONS)))
    wanted, others = OPERATIONS[name]
    arguments = {each: vectors(draw) for each in wanted}
    arguments |= {each: draw(mostly(values, ODD)) for each, values in others.items()}
    written = [t.clone() for each in arguments.values() for t in _all(each)]
    refused = calls["refused"]
    tried(lambda: getattr(ops, name)(**arguments))
    if calls["refused"] > refused:
        now = [t for each in arguments.values() for t in _all(each)]
        assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(written, now, strict=True))


def _all(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for each in value if isinstance(each, torch.Tensor)] if isinstance(value, list | tuple) else []


def losing(draw):
    cap = draw(st.one_of(small, odd))
    loss = tried(lambda: BoundedForgetting(cap))
    chosen = loss or draw(st.sampled_from([cross_entropy, negative_cross_entropy]))
    torch.manual_seed(3)
    model = draw(st.sampled_from([mlp(), mlp(classes=1), mlp(classes=4).half().float()]))
    batch = draw(
        mostly([blobs(4), {"input": blobs(4)[0], "labels": blobs(4)[1]}], [blobs(0), (blobs(4)[0], None), *ODD])
    )
    value = tried(lambda: chosen(model, batch), model)
    assert value is None or value.shape == ()


RULES = {
    TimeBudget: {"seconds": [1, 0.5]},
    Patience: {"metric": [LossOn(blobs(5))], "looks": [1, 3], "every": [1], "better": ["lower", "higher"], "by": [0.1]},
    Reached: {"metric": [ErrorOn(blobs(5)), lambda model: "much"], "at_least": [50, 0.5], "at_most": [1], "every": [2]},
    Trim: {"sparsity": [0.0, 0.5], "layers": [None, "*", ["0.*"]], "batches": [None, 1]},
    SaliencyMask: {"share": [0.0, 0.5], "batches": [None, 1]},
    ErrorOn: {"data": [blobs(5), Items(lambda i: (torch.randn(6), 1))], "batch_size": [3]},
    LossOn: {"data": [blobs(5), []], "batch_size": [3]},
}


def making_parts(draw):
    kind = draw(st.sampled_from(list(RULES)))
    needed = {"seconds", "metric", "data"}
    chosen = {name: draw(mostly(values, ODD)) for name, values in RULES[kind].items() if name in needed}
    chosen |= options(draw, RULES[kind], RULES[kind])
    part = tried(lambda: kind(**chosen))
    if part is None:
        return
    assert repr(part)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    use = {"stop": part}
    if kind in (Trim, SaliencyMask):
        use = {"method": fastlur.LUR(**{"trim" if kind is Trim else "mask": part})}
    elif kind in (ErrorOn, LossOn):
        use = {"stop": Reached(part, at_most=-1.0, every=1)}
    sides, use = (blobs(9), blobs(20)), {"steps": 2, "batch_size": 8, "progress": False} | use
    steps = []
    use["callbacks"] = [lambda event: steps.append(event.step)]  # what a rule looks at shows only then
    tried(lambda: fastlur.unlearn(model, *sides, **use), model, begun=steps)
