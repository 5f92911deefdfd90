"""Bad input gets one clear line, before any parameter changes."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp, same, state
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset

import fastlur

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 4
FORGET, RETAIN = (X[:10], Y[:10]), (X[10:], Y[10:])
SET = TensorDataset(X, Y)


class Decoded(Dataset):
    """A data set that is more than tensors."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i].numpy(), int(self.y[i])


class Raises(Dataset):
    """A data set that cannot be read."""

    def __init__(self, divisor=1):
        self.divisor = divisor

    def __len__(self):
        return 9 // self.divisor

    def __getitem__(self, i):
        raise KeyError("no such image")


def spoiled(value):
    x = X[:10].clone()
    x[3, 2] = value
    return x, Y[:10]


def wrong_label(label):
    y = Y[:10].clone()
    y[7] = label
    return X[:10], y


CASES = {
    "empty forget": ({"forget": (X[:0], Y[:0])}, fastlur.DataError, "forget: is empty"),
    "empty retain": ({"retain": []}, fastlur.DataError, "retain: is empty"),
    "empty dataset": ({"forget": Subset(SET, [])}, fastlur.DataError, "forget: is empty"),
    "empty loader": ({"retain": DataLoader(Subset(SET, []))}, fastlur.DataError, "retain: is empty"),
    "same object": ({"forget": SET, "retain": SET}, fastlur.DataError, "retain: is the same object as forget"),
    "label too large": ({"forget": wrong_label(4)}, fastlur.DataError, r"forget: label 4 is outside the model's 4"),
    "label negative": ({"retain": wrong_label(-1), "forget": RETAIN}, fastlur.DataError, "retain: label -1"),
    "label in a dataset": ({"forget": Decoded(*wrong_label(9))}, fastlur.DataError, "forget: label 9"),
    "NaN": ({"forget": spoiled(float("nan"))}, fastlur.DataError, "forget: holds a NaN or infinite value"),
    "inf in a dataset": ({"forget": TensorDataset(*spoiled(float("inf")))}, fastlur.DataError, "forget: holds a NaN"),
    "NaN in batches": ({"forget": [spoiled(float("nan"))]}, fastlur.DataError, "forget: holds a NaN .* item 3"),
    "NaN decoded": ({"forget": Decoded(*spoiled(float("nan")))}, fastlur.DataError, "forget: holds a NaN .* item 3"),
    "unequal lengths": ({"forget": (X[:10], Y[:9])}, fastlur.DataError, r"forget: its tensors have \[10, 9\] rows"),
    "a switch": ({"allow_overlap": torch.ones(0)}, fastlur.ArgumentError, "allow_overlap=tensor"),
    "another switch": ({"deterministic": "yes"}, fastlur.ArgumentError, "deterministic='yes' must be True or False"),
    "None among batches": (
        {"retain": [RETAIN, None]},
        fastlur.DataError,
        "retain: cannot be read .*a NoneType without",
    ),
    "one-shot iterator": ({"forget": iter([FORGET])}, fastlur.DataError, "forget: .* can be read only once"),
    "no data": ({"retain": 5}, fastlur.DataError, "retain: a int is no data"),
    "wrong shape": ({"forget": (X[:10, :3], Y[:10])}, fastlur.DataError, "forget: the model .* cannot take"),
    "float targets": ({"forget": (X[:10], X[:10, 0])}, fastlur.ArgumentError, "task='auto': forget"),
    "vector loss": ({"loss": lambda m, b: m(b[0])}, fastlur.DataError, r"loss: returned a tensor of shape \(30, 4\)"),
    "float loss": ({"forget_loss": lambda m, b: 1.0}, fastlur.DataError, "forget_loss: returned a float"),
    "detached loss": ({"loss": lambda m, b: m(b[0]).mean().detach()}, fastlur.DataError, "loss: depends on no"),
    "NaN loss": ({"loss": lambda m, b: m(b[0]).mean() * float("nan")}, fastlur.DataError, "loss: is nan"),
    "negative steps": ({"steps": -1}, fastlur.ArgumentError, "steps=-1"),
    "zero steps": ({"steps": 0}, fastlur.ArgumentError, "steps=0"),
    "fractional steps": ({"steps": 1.5}, fastlur.ArgumentError, r"steps=1\.5"),
    "zero epochs": ({"epochs": 0}, fastlur.ArgumentError, "epochs=0"),
    "steps and epochs": ({"steps": 1, "epochs": 1}, fastlur.ArgumentError, "give one of them"),
    "batch size": ({"batch_size": 0}, fastlur.ArgumentError, "batch_size=0"),
    "lr": ({"lr": -0.1}, fastlur.ArgumentError, "lr=-0.1"),
    "momentum": ({"momentum": 1.0}, fastlur.ArgumentError, "momentum=1.0"),
    "weight decay": ({"weight_decay": float("nan")}, fastlur.ArgumentError, "weight_decay=nan"),
    "clip": ({"max_grad_norm": 0}, fastlur.ArgumentError, "max_grad_norm=0"),
    "method": ({"method": "lurr"}, fastlur.ArgumentError, "method='lurr'.*did you mean 'lur'"),
    "method class": ({"method": fastlur.LUR}, fastlur.ArgumentError, "method="),
    "optimizer": ({"optimizer": "adamv"}, fastlur.ArgumentError, "optimizer='adamv'.*did you mean 'adamw'"),
    "schedule": ({"schedule": "linaer"}, fastlur.ArgumentError, "schedule='linaer'.*did you mean 'linear'"),
    "precision": ({"precision": "fp8"}, fastlur.ArgumentError, "precision='fp8'"),
    "task": ({"task": "clasification"}, fastlur.ArgumentError, "task='clasification'.*did you mean"),
    "seed": ({"seed": "7"}, fastlur.ArgumentError, "seed='7'"),
    "seed's kind": ({"seed": True}, fastlur.ArgumentError, "seed=True"),
    "memory format": ({"memory_format": "last"}, fastlur.ArgumentError, "memory_format='last'"),
    "memory format for five dimensions": ({"memory_format": torch.channels_last_3d}, fastlur.ArgumentError, "_last_3d"),
    "float8": ({"forget": (X[:10].to(torch.float8_e4m3fn), Y[:10])}, fastlur.DataError, "forget: cannot be read"),
    "conjugate": ({"forget": (torch.complex(X, X).conj(), Y)}, fastlur.DataError, "forget: cannot be read"),
    "sparse": ({"forget": (X[:10].to_sparse(), Y[:10])}, fastlur.DataError, "forget: cannot be read"),
    "a set that raises": (
        {"forget": Raises()},
        fastlur.DataError,
        r"forget: cannot be read \(KeyError: 'no such image'\)",
    ),
    "a length that raises": ({"retain": Raises(0)}, fastlur.DataError, "retain: a Raises without a length"),
    "pattern": ({"parameters": "layer4.*"}, fastlur.ModelError, r"parameters: 'layer4\.\*' matches no parameter"),
    "one of two patterns": ({"parameters": ["0.*", "x"]}, fastlur.ModelError, "parameters: 'x' matches no"),
    "predicate": ({"parameters": lambda n, p: False}, fastlur.ModelError, "parameters: no trainable parameter"),
    "budget": ({"max_retain_loss_increase": -1}, fastlur.ArgumentError, "max_retain_loss_increase=-1"),
    "momentum's kind": ({"momentum": "a"}, fastlur.ArgumentError, "momentum='a'"),
    "callbacks": ({"callbacks": [5]}, fastlur.ArgumentError, "callbacks: 5 cannot be called"),
    "stop": ({"stop": 5}, fastlur.ArgumentError, "stop: 5 cannot be called"),
    "checkpoint": ({"checkpoint": 5}, fastlur.ArgumentError, "checkpoint=5"),
    "device": ({"device": "foo"}, fastlur.ArgumentError, "device='foo' cannot be used"),
    "parameters' kind": ({"parameters": 5}, fastlur.ModelError, "parameters=5"),
    "foreign optimizer": (
        {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)},
        fastlur.ArgumentError,
        "holds none of the parameters",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line_and_nothing_changed(case):
    change, error, said = CASES[case]
    model = mlp()
    before, modes = state(model), [m.training for m in model.modules()]
    arguments = {"forget": FORGET, "retain": RETAIN} | change
    with pytest.raises(error, match=said) as caught:
        fastlur.unlearn(model, **arguments, progress=False)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, fastlur.FastlurError)
    assert same(before, state(model))
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


OVERLAPS = {
    "whole set, same tensors": (FORGET, (X, Y)),
    "whole set, copies": (FORGET, (X.clone(), Y.clone())),
    "one item": (FORGET, (X[9:], Y[9:])),
    "subset and its set": (Subset(SET, range(10)), SET),
    "two subsets": (Subset(SET, range(10)), Subset(SET, range(5, 40))),
    "nested subsets": (Subset(Subset(SET, range(20)), [0, 1]), Subset(SET, [1, 30])),
    "loader over the set": (Subset(SET, range(10)), DataLoader(SET, batch_size=8)),
    "samplers": (
        DataLoader(SET, 4, sampler=SubsetRandomSampler(range(10))),
        DataLoader(SET, 4, sampler=SubsetRandomSampler(range(9, 40))),
    ),
    "another container": (FORGET, [(X[:20], Y[:20]), (X[20:], Y[20:])]),
    "decoded": (Decoded(*FORGET), Decoded(X, Y)),
    "decoded and tensors": (FORGET, Decoded(X, Y)),
    "dicts": ({"input": X[:10], "labels": Y[:10]}, {"input": X, "labels": Y}),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_retain_data_that_hold_forget_items_are_refused(case):
    model = mlp()
    before = state(model)
    with pytest.raises(fastlur.DataError, match=r"retain: contains \d+ of \d+ forget items"):
        fastlur.unlearn(model, *OVERLAPS[case], progress=False)
    assert same(before, state(model))


def test_a_whole_set_in_a_loader_is_noticed_however_long_it_is():
    x = torch.randn(12_000, 6, generator=torch.Generator().manual_seed(2))
    y = torch.arange(12_000) % 4
    whole = DataLoader(TensorDataset(x, y), 64)
    with pytest.raises(fastlur.DataError, match="retain: contains 50 of 50 forget items"):
        fastlur.unlearn(mlp(), (x[9000:9050], y[9000:9050]), whole, progress=False)
    y[11_000] = 9
    with pytest.raises(fastlur.DataError, match="retain: label 9"):
        fastlur.unlearn(mlp(), FORGET, whole, progress=False)
    y[11_000], x[11_500, 1] = 0, float("nan")
    with pytest.raises(fastlur.DataError, match="retain: holds a NaN"):
        fastlur.unlearn(mlp(), FORGET, whole, progress=False)


def test_where_only_a_sample_was_compared_a_warning_says_so():
    many = Decoded(X.repeat(200, 1) + torch.arange(8000)[:, None] + 1.0, Y.repeat(200))
    with pytest.warns(UserWarning, match=r"retain: only \d+ items, drawn at random, were compared .* 3000 were not"):
        fastlur.unlearn(mlp(), FORGET, many, steps=1, progress=False)


def test_a_label_that_slips_through_is_named_in_the_run():
    with pytest.raises(fastlur.DataError, match="a target is outside the model's 4 logits"):
        fastlur.losses.cross_entropy(mlp(), (X[:2], torch.tensor([1, 9])))


DISJOINT = {
    "tensors": (FORGET, RETAIN),
    "subsets": (Subset(SET, range(10)), Subset(SET, range(10, 40))),
    "samplers": (
        DataLoader(SET, 4, sampler=SubsetRandomSampler(range(10))),
        DataLoader(SET, 4, sampler=SubsetRandomSampler(range(10, 40))),
    ),
    "samplers of one's own": (DataLoader(SET, 4, sampler=range(10)), DataLoader(SET, 4, sampler=range(10, 40))),
    "batch samplers": (
        DataLoader(SET, batch_sampler=[[0, 1], [2, 3]]),
        DataLoader(SET, batch_sampler=[[10, 11], [12, 13]]),
    ),
    "attention masks": (
        {"input": X[:10], "labels": Y[:10], "mask": torch.full((10,), -torch.inf)},
        {"input": X[10:], "labels": Y[10:], "mask": torch.full((30,), -torch.inf)},
    ),
    "same inputs, other labels": (FORGET, (X[:10], (Y[:10] + 1) % 4)),
}


@pytest.mark.parametrize("case", DISJOINT)
def test_disjoint_data_are_taken(case):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, input, mask=None):
            return self.body(input)

    fastlur.unlearn(Model(), *DISJOINT[case], steps=1, batch_size=4, progress=False)


def test_an_overlap_can_be_allowed():
    fastlur.unlearn(mlp(), FORGET, (X, Y), steps=1, allow_overlap=True, progress=False)


def test_a_model_of_integers_is_refused():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    with pytest.raises(fastlur.ModelError, match="not floating point"):
        fastlur.unlearn(model, FORGET, RETAIN, progress=False)


def test_a_model_with_everything_frozen_is_refused():
    model = mlp().requires_grad_(False)
    with pytest.raises(fastlur.ModelError, match="model: no trainable parameter"):
        fastlur.unlearn(model, FORGET, RETAIN, progress=False)


def test_something_that_is_no_model_is_refused():
    with pytest.raises(fastlur.ModelError, match="no torch"):
        fastlur.unlearn(lambda x: x, FORGET, RETAIN, progress=False)


def test_batch_norm_with_one_forget_item_is_refused_where_it_cannot_work():
    flat = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    one = Subset(TensorDataset(*FORGET), [0])
    before = state(flat)
    with pytest.raises(fastlur.DataError, match="forget: batch norm needs more than one item"):
        fastlur.unlearn(flat, one, RETAIN, progress=False)
    assert same(before, state(flat))
    spatial = nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(18, 4)
    )
    fastlur.unlearn(spatial, one, RETAIN, steps=2, progress=False)
    assert int(spatial[2].num_batches_tracked) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gradient": "exactt"}, "did you mean 'exact'"),
        ({"order": "retain_frist"}, "did you mean 'retain_first'"),
        ({"inner_lr": -0.1}, "inner_lr=-0.1"),
        ({"forget_weight": -1}, "forget_weight=-1"),
    ],
)
def test_lur_refuses_bad_settings(arguments, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        fastlur.LUR(**arguments)


def test_metastep_refuses_before_it_touches_the_model():
    model = mlp()
    with pytest.raises(fastlur.ArgumentError, match="optimizer='sdg'"):
        fastlur.MetaStep(model, optimizer="sdg")
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
