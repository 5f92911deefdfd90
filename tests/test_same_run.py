"""What a run must share with the one it continues."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import job
from helpers import Interrupted, state
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

import fastlur
from fastlur.losses import cross_entropy
from fastlur.stopping import Patience

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
