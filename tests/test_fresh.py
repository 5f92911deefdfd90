"""Nothing of what a model knew is left in parameters drawn anew, however its modules hold them."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import blobs, run, same, state
from torch import nn

import fastlur
from fastlur.fresh import copied, reinitialise, renew
from fastlur.losses import cross_entropy
from fastlur.methods import BadTeacher, Retrain, ScissorHands
from fastlur.passes import Passes
from fastlur.space import ParameterSpace
from fastlur.targets import Novice, SecondChoice


class Scaled(nn.Linear):
    """A layer with a parameter that its `reset_parameters` does not know of."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.rand(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def hooked(wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(wrap(nn.Linear(6, 12)), nn.Tanh(), nn.Linear(12, 4))


KINDS = {
    "weight_norm": (lambda: hooked(nn.utils.weight_norm), "0.weight_g"),
    "spectral_norm": (lambda: hooked(nn.utils.spectral_norm), "0.weight_orig"),
    "parametrized": (lambda: hooked(nn.utils.parametrizations.weight_norm), "0.parametrizations.weight.original0"),
    "extra": (lambda: nn.Sequential(Scaled(6, 12), nn.Tanh(), nn.Linear(12, 4)), "0.scale"),
}


@pytest.fixture(params=KINDS)
def kind(request):
    make, undrawn = KINDS[request.param]
    torch.manual_seed(3)
    model = make()
    model(torch.randn(4, 6))
    return model, undrawn


def passes_over(model: nn.Module) -> Passes:
    losses = {"forget": cross_entropy, "retain": cross_entropy}
    return Passes(ParameterSpace(model), losses, {"forget": 1.0, "retain": 1.0})


def test_every_parameter_is_another_one_afterwards(kind):
    model, _ = kind
    passes = passes_over(model)
    before, out = state(model), passes.space.vector()
    reinitialise(passes, out, shuffle=True)
    for name, value in zip(passes.space.names, out.views, strict=True):
        assert bool(torch.isfinite(value).all()), name
        assert not torch.equal(value, before[name]), name
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
    passes.space.close()
    renew(model, list(model.parameters()))
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]


def test_retraining_refuses_what_would_keep_trained_weights_and_changes_nothing(kind):
    model, undrawn = kind
    model.insert(1, nn.BatchNorm1d(12))
    model[1].running_mean.fill_(2.0)
    before = state(model)
    with pytest.raises(fastlur.ModelError, match=f"'{undrawn}'"):
        run(model, blobs(8), blobs(8), method=Retrain(reinitialise=True))
    assert same(before, state(model))


@pytest.mark.filterwarnings("ignore:Novice")
def test_whoever_copies_the_model_copies_this_one_too(kind):
    model, _ = kind
    twin = copied(model)
    assert torch.equal(twin.eval()(torch.ones(1, 6)), model.eval()(torch.ones(1, 6)))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    for target in (Novice(epochs=1), SecondChoice()):
        run(model, blobs(8), blobs(8), forget_loss=target)
    run(model, blobs(8), blobs(8), method=ScissorHands(form="as_published"))
    run(model, blobs(8), blobs(8), method=BadTeacher())


class TestStatisticsWithoutParameters:
    def model(self) -> nn.Module:
        norms = [nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(12, affine=False)]
        for norm in norms:
            norm.running_mean.fill_(2.0)
        return nn.Sequential(norms[0], nn.Linear(6, 12), norms[1], nn.Linear(12, 4))

    def test_they_are_reset_with_the_layer_before(self):
        model = self.model()
        renew(model, list(model.parameters()))
        assert float(model[0].running_mean.abs().max()) == float(model[2].running_mean.abs().max()) == 0

    def test_they_stay_where_that_layer_does(self):
        model = self.model()
        renew(model, list(model[3].parameters()))
        assert float(model[0].running_mean.min()) == float(model[2].running_mean.min()) == 2
