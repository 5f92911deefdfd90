"""What a run must share with the one it continues, and that nothing is written before all of it was compared."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from hashlib import blake2b

import numpy as np
import pytest
import torch
from checkpoints import break_off, go_on, job
from helpers import Interrupted, same, state
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

import fastlur
from fastlur.identity import fingerprint
from fastlur.losses import cross_entropy
from fastlur.stopping import Patience, Reached

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 4
SET = TensorDataset(X, Y)


def loader(size=8, **options):
    return DataLoader(SET, size, **options)


def scaled(by):
    return lambda model, batch: cross_entropy(model, batch) * by


class Weighted(nn.Module):
    """A loss that is a module, with a setting and a buffer."""

    def __init__(self, smoothing=0.0, weight=1.0):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, model, batch):
        return self.inner(model(batch[0]), batch[1]) * self.weight


class Scaling:
    """A loss that is an object, which shows nothing and counts its calls where nobody looks."""

    def __init__(self, by):
        self.by, self._calls = by, 0

    def __call__(self, model, batch):
        self._calls += 1
        return cross_entropy(model, batch) * self.by


@dataclasses.dataclass
class Shown:
    """A loss that is a dataclass, which shows no more of a long tensor than its ends."""

    weight: torch.Tensor

    def __call__(self, model, batch):
        return cross_entropy(model, batch) * self.weight.mean()


class Holding:
    """A loss that is an object holding something else."""

    def __init__(self, held):
        self.held = held

    def __call__(self, model, batch):
        return cross_entropy(model, batch)


class HoldingChanged(Holding):
    def __call__(self, model, batch):
        return cross_entropy(model, batch) * 2.0


HoldingChanged.__name__, HoldingChanged.__qualname__ = "Holding", "Holding"


def ends(middle):
    return torch.cat([torch.zeros(1500), torch.full((1,), middle), torch.zeros(1500)])


def weighted_by(model, batch, weight=None):
    return cross_entropy(model, batch) * weight.mean()


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Own(fastlur.LUR):
    def direction(self, passes, state):
        return super().direction(passes, state)


class OwnChanged(fastlur.LUR):
    def direction(self, passes, state):
        found = super().direction(passes, state)
        return found._replace(l1=0.1)


OwnChanged.__name__ = "Own"
OwnChanged.__qualname__ = "Own"

CHANGES = {
    "batches of a loader": ({"retain": loader}, {"retain": lambda: loader(4)}, "retain batches was"),
    "shuffling": ({"retain": loader}, {"retain": lambda: loader(shuffle=True)}, "retain batches was"),
    "dropping the last": ({"retain": loader}, {"retain": lambda: loader(drop_last=True)}, "retain batches was"),
    "workers": ({"retain": loader}, {"retain": lambda: loader(num_workers=1)}, "retain batches was"),
    "collating": (
        {"retain": loader},
        {"retain": lambda: loader(collate_fn=lambda items: tuple(map(torch.stack, zip(*items, strict=True))))},
        "retain batches was",
    ),
    "replacement": (
        {"retain": lambda: loader(sampler=RandomSampler(SET))},
        {"retain": lambda: loader(sampler=RandomSampler(SET, replacement=True))},
        "retain batches was",
    ),
    "indices": (
        {"retain": lambda: loader(sampler=SubsetRandomSampler(range(30)))},
        {"retain": lambda: loader(sampler=SubsetRandomSampler(range(29)))},
        "retain (batches|data) was",
    ),
    "batches of a list": (
        {"retain": lambda: [(X[:20], Y[:20]), (X[20:], Y[20:])]},
        {"retain": lambda: [(X[:10], Y[:10]), (X[10:], Y[10:])]},
        "retain batches was",
    ),
    "what a loss closes over": ({"loss": lambda: scaled(1.0)}, {"loss": lambda: scaled(0.5)}, r"loss (does )?was"),
    "code of a loss": (
        {"loss": lambda: lambda m, b: cross_entropy(m, b) * 1.0},
        {"loss": lambda: lambda m, b: cross_entropy(m, b) + 1.0},
        r"loss (does )?was",
    ),
    "setting of a module": (
        {"forget_loss": Weighted},
        {"forget_loss": lambda: Weighted(smoothing=0.1)},
        "what forget_loss does was",
    ),
    "buffer of a module": ({"loss": Weighted}, {"loss": lambda: Weighted(weight=2.0)}, r"loss (does )?was"),
    "attribute of an object": ({"loss": lambda: Scaling(1.0)}, {"loss": lambda: Scaling(2.0)}, r"loss (does )?was"),
    "argument of a partial": (
        {"loss": lambda: functools.partial(weighted_by, weight=torch.ones(2000))},
        {"loss": lambda: functools.partial(weighted_by, weight=torch.arange(2000) / 1000)},
        r"loss (does )?was",
    ),
    "tensor in a dataclass": (
        {"loss": lambda: Shown(ends(1.0))},
        {"loss": lambda: Shown(ends(2.0))},
        r"loss (does )?was",
    ),
    **{
        f"{kind} in an object": (
            {"loss": lambda make=make: Holding(make(1.0))},
            {"loss": lambda make=make: Holding(make(2.0))},
            r"loss (does )?was",
        )
        for kind, make in {
            "list": lambda x: [0.0, [x]],
            "dict": lambda x: {"weights": {"a": x}},
            "set": lambda x: {x},
            "array": lambda x: ends(x).numpy(),
            "array of objects": lambda x: np.array([x, "a"], dtype=object),
            "object": Scaling,
            "slot": Slotted,
        }.items()
    },
    "code of a class": ({"loss": lambda: Holding(1)}, {"loss": lambda: HoldingChanged(1)}, r"loss (does )?was"),
    "metric of a rule": (
        {"stop": lambda: Patience(lambda model: 1.0, looks=99)},
        {"stop": lambda: Patience(lambda model: 2.0, looks=99)},
        "stop was",
    ),
    "rule without settings": (
        {"stop": lambda: lambda event: event.step == 1000},
        {"stop": lambda: lambda event: event.step == 1001},
        "stop was",
    ),
    "code of a method": ({"method": Own}, {"method": OwnChanged}, "code of the method was"),
}


def call(tmp_path, made, callbacks=()):
    model, (forget, retain), options = job(tmp_path)
    options |= {name: make() for name, make in made.items()}
    retain = options.pop("retain", retain)
    before = state(model)
    try:
        fastlur.unlearn(model, forget, retain, **options, callbacks=callbacks)
    finally:
        model.was = before
    return model


def breaks(event):
    if event.step == 5:
        raise Interrupted


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_refused_by_name_and_no_change_is_not(tmp_path, case):
    first, changed, said = CHANGES[case]
    with pytest.raises(Interrupted):
        call(tmp_path, first, [breaks])
    with pytest.raises(fastlur.CheckpointError, match=said) as caught:
        call(tmp_path, first | changed)
    assert "\n" not in str(caught.value)
    steps = []
    call(tmp_path, first, [lambda event: steps.append(event.step)])
    assert steps == [5, 6, 7, 8, 9]


def test_an_optimizer_over_other_parameters_is_refused_by_name(tmp_path):
    def go(some, callbacks=()):
        model, data, options = job(tmp_path)
        held = [getattr(model[0], name) for name in some]
        fastlur.unlearn(model, *data, **options, optimizer=torch.optim.SGD(held, lr=0.1), callbacks=callbacks)

    with pytest.raises(Interrupted):
        go(["weight", "bias"], [breaks])
    for other in (["weight"], ["bias", "weight"]):
        with pytest.raises(fastlur.CheckpointError, match=r"optimizer's parameters was \[\['0\.weight', '0\.bias'\]\]"):
            go(other)
    go(["weight", "bias"])


def test_what_an_object_notes_under_a_private_name_is_not_compared(tmp_path):
    loss = Scaling(1.0)
    with pytest.raises(Interrupted):
        call(tmp_path, {"loss": lambda: loss}, [breaks])
    assert loss._calls
    call(tmp_path, {"loss": lambda: loss})


PROGRAM = """
import functools, sys, torch, fastlur
from torch.nn.functional import cross_entropy
class Holder: pass
def loss(model, batch, *held): return cross_entropy(model(batch[0]), batch[1])
class Metric:
    def __call__(self, model): return 1.0
torch.manual_seed(0)
data = (torch.randn(12, 6), torch.arange(12) % 4), (torch.randn(40, 6), torch.arange(40) % 4)
steps = []
def callback(event):
    steps.append(event.step)
    if event.step == 5 and sys.argv[2] == "break": raise SystemExit
loss = functools.partial(loss) if False else functools.partial(lambda a, m, b: cross_entropy(m(b[0]), b[1]), Holder())
fastlur.unlearn(torch.nn.Linear(6, 4), *data, loss=loss, forget_loss=lambda m, b: -cross_entropy(m(b[0]), b[1]),
    stop=[fastlur.stopping.Patience(Metric(), looks=99), lambda event: event.step in {100, "x", "y"}],
    steps=8, checkpoint=sys.argv[1], checkpoint_every=2, progress=False, callbacks=[callback])
print(steps)
"""


def test_another_process_is_no_change(tmp_path):
    def process(what):
        arguments = [sys.executable, "-c", PROGRAM, str(tmp_path), what]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()

    process("break")
    assert process("go on") == "[5, 6, 7, 8]"


class TestFingerprint:
    def test_it_follows_what_functions_are_made_of(self):
        def outer(n):
            def inner(x, y=n):
                return [x for _ in range(n)]

            return lambda z: inner(z)

        assert fingerprint(outer(1)) == fingerprint(outer(1))
        assert fingerprint(outer(1)) != fingerprint(outer(2))
        assert fingerprint(functools.partial(max, 1)) != fingerprint(functools.partial(max, 2))
        assert fingerprint(Scaling(1).__call__) != fingerprint(Scaling(2).__call__)

    def test_it_ends(self):
        held = []
        held.append(held)

        def itself():
            return itself, held

        assert fingerprint(itself) == fingerprint(itself)

    @pytest.mark.parametrize(
        "value", [None, 5, "x", {}, [1, {2, "a"}], object, max, torch.relu, nn.Linear(2, 2), Ellipsis]
    )
    def test_of_anything(self, value):
        assert fingerprint(value) == fingerprint(value)
        assert " at 0x" not in fingerprint(value)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.ones(3).to(torch.float8_e4m3fn),
            torch.complex(torch.ones(2), torch.ones(2)).conj(),
            torch.eye(3).to_sparse(),
            torch.ones(()),
            torch.ones(0),
            torch.ones(2, 3).t(),
        ],
    )
    def test_of_tensors_of_every_kind(self, tensor):
        holding = lambda tensor: lambda: tensor
        assert fingerprint(holding(tensor)) == fingerprint(holding(tensor.clone()))
        if tensor.numel():
            other = torch.zeros(tensor.shape).to(tensor.dtype)
            assert fingerprint(holding(tensor)) != fingerprint(holding(other))


def forged(tmp_path, change):
    """The newest checkpoint with another description and its checksum in order."""
    path = max(tmp_path.glob("*.json"))
    record = json.loads(path.read_bytes())["record"]
    change(record)
    text = json.dumps(record)
    checksum = blake2b(text.encode(), digest_size=32).hexdigest()
    path.write_bytes(json.dumps({"fastlur": "checkpoint", "record": record, "checksum": checksum}).encode())


MISFITS = {
    "place in the data": lambda record: record["streams"]["retain"].update(taken=3),
    "seed": lambda record: record["streams"]["forget"].update(seed=3),
    "no streams": lambda record: record.pop("streams"),
    "rules": lambda record: record.update(rules=[]),
    "state of a rule": lambda record: record["rules"][0].pop("best"),
    "kind of a rule's state": lambda record: record.update(rules=[None]),
    "history": lambda record: record["history"].pop("cosine"),
    "length of the history": lambda record: record["history"]["lr"].pop(),
    "text in the history": lambda record: record["history"].update(lr=["a"] * 4),
    "baseline": lambda record: record.update(baseline=None),
    "infinite baseline": lambda record: record.update(baseline=float("inf")),
    "end": lambda record: record.update(ended=5),
    "random states": lambda record: record.update(random={"plain": None}),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_before_a_weight_is_written(tmp_path, case):
    rule = Patience(lambda model: 1.0, looks=99, every=1)
    options = {"stop": rule, "max_retain_loss_increase": 99.0}
    break_off(*job(tmp_path, **options))
    forged(tmp_path, MISFITS[case])
    rule.best, rule.waited = 5.0, 7
    model, data, options = job(tmp_path, **options)
    before, modes = state(model), model.training
    with pytest.raises(fastlur.CheckpointError, match="step 4 does not fit this run") as caught:
        fastlur.unlearn(model, *data, **options)
    assert "\n" not in str(caught.value)
    assert same(state(model), before)
    assert model.training == modes
    assert (rule.best, rule.waited) == (5.0, 7)


@pytest.mark.parametrize("change", ["shape", "kind"])
def test_buffers_of_another_shape_or_kind_are_refused(tmp_path, change):
    import safetensors.torch

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))

    break_off(*job(tmp_path, model()))
    file = max(tmp_path.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    mean = tensors["buffer/1.running_mean"]
    tensors["buffer/1.running_mean"] = mean[:1].clone() if change == "shape" else mean.double()
    file.write_bytes(safetensors.torch.save(tensors))
    checksum = blake2b(file.read_bytes(), digest_size=32).hexdigest()
    forged(tmp_path, lambda record: record.update(checksum=checksum))
    mine, data, options = job(tmp_path, model())
    before = state(mine)
    with pytest.raises(fastlur.CheckpointError, match=r"buffer '1\.running_mean' is"):
        fastlur.unlearn(mine, *data, **options)
    assert same(state(mine), before)


class TestEndedEarly:
    @pytest.mark.parametrize("method", ["lur", "mox"])
    @pytest.mark.filterwarnings("ignore:MOX")
    def test_a_run_that_a_rule_ended_and_that_kept_its_checkpoints_ends_at_once(self, tmp_path, method):
        looks = []
        rule = Reached(lambda model: looks.append(1) or float(len(looks)), at_least=7, every=1)
        model, data, options = job(tmp_path, keep_checkpoints=True, stop=rule, steps=30, method=method)
        args = model, data, options
        first, steps = go_on(*args)
        assert steps == [1, 2, 3, 4, 5, 6, 7]
        looks.clear()  # it would go on for seven steps more
        again, steps = go_on(*args)
        assert steps == []
        assert same(state(again), state(first))

    def test_the_reason_is_that_of_the_run(self, tmp_path):
        model, data, options = job(tmp_path, keep_checkpoints=True, stop=lambda event: event.step == 3 and "enough")
        assert fastlur.unlearn(model, *data, **options).ended == "enough"
        model, data, options = job(tmp_path, keep_checkpoints=True, stop=options["stop"])
        result = fastlur.unlearn(model, *data, **options)
        assert result.ended == "enough"
        assert result.history["step"] == [1, 2, 3]

    def test_a_budget_that_ended_it_ends_it_again(self, tmp_path):
        def go():
            options = {"lr": 5.0, "schedule": "constant", "max_retain_loss_increase": 0.01, "keep_checkpoints": True}
            model, data, options = job(tmp_path, **options, steps=40)
            with torch.no_grad():
                model[3].weight.mul_(3)
            return fastlur.unlearn(model, *data, **options)

        first, again = go(), go()
        assert "rolled back" in first.ended
        assert again.ended == first.ended
        assert again.history == first.history
        assert same(state(again.model), state(first.model))
