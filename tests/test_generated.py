"""Generated calls over the public surface: each works, or is refused by a documented error before anything changes.

`make check-slow` makes thousands of them and prints how many.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings

import pytest
import torch
from generated import ODD, Items, Watch, calls, data, mlp, models, mostly, odd, of_ours, small, tried
from helpers import blobs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fastlur
from fastlur import ops
from fastlur.losses import BoundedForgetting, cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.operands import control_scalars, hyper_parameters
from fastlur.stopping import ErrorOn, LossOn, Patience, Reached, TimeBudget

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


def options(draw, sensible, strange, most=3):
    """Some of the sensible options, and now and then a value that is none."""
    names = draw(st.lists(st.sampled_from(sorted(sensible)), max_size=most, unique=True))
    chosen = {name: draw(st.sampled_from(sensible[name])) for name in names}
    if draw(st.integers(0, 2)) == 2:
        chosen[draw(st.sampled_from(sorted(strange)))] = draw(odd)
    return chosen


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


PROPERTIES = {
    "unlearn": (unlearning, 40, 1200),
    "MetaStep": (stepping, 15, 300),
    "meta_gradient": (differentiating, 15, 300),
    "evaluate": (evaluating, 15, 300),
    "methods": (choosing_methods, 15, 400),
    "names of methods": (naming_methods, 10, 100),
    "operations": (operating, 40, 600),
    "losses": (losing, 10, 150),
    "parts": (making_parts, 15, 300),
}


def generate(name, count):
    """So many calls of one property, the same ones each time."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=health,
        phases=[Phase.generate],  # making a failure smaller takes minutes, and each is printed as it is
    )
    @given(st.data())
    def every(drawn):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, for some of the odd models
            PROPERTIES[name][0](drawn.draw)

    before = dict(calls)
    every()
    worked, refused, passed = (calls[kind] - before[kind] for kind in ("worked", "refused", "passed on"))
    assert worked > 0
    assert refused > 0
    print(
        f"\n{name}: {worked + refused + passed} calls, {worked} worked, {refused} were refused, {passed} raised what "
        f"a callable of the caller's raised; {sum(calls.values())} calls so far"
    )


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_call_works_or_is_refused_before_anything_changes(name):
    generate(name, PROPERTIES[name][1])


many: dict[str, int] = {}  # calls by property


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_thousands_of_calls_work_or_are_refused_before_anything_changes(name):
    before = sum(calls.values())
    generate(name, PROPERTIES[name][2])
    many[name] = sum(calls.values()) - before
    assert set(many) != set(PROPERTIES) or sum(many.values()) >= 2000
