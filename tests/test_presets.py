"""Published settings by name: each is a call of `unlearn` that runs as it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import state
from test_methods_quality import error, trained  # noqa: F401
from torch import nn

import fastlur
from fastlur.demo import Residual, digits
from fastlur.losses import negative_cross_entropy
from fastlur.methods import METHODS, Trim

PRESETS = [(name, preset) for name in sorted(METHODS) for preset in METHODS[name].presets]


class Layered(nn.Module):
    """A small network with the names of a ResNet-18."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer3, self.layer4, self.fc = Residual(8), Residual(8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.layer4(self.layer3(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def data():
    (images, labels), _ = digits(0)
    return (images[:40], labels[:40]), (images[40:170], labels[40:170])


@pytest.mark.parametrize(("method", "preset"), PRESETS)
def test_it_runs_as_it_is(method, preset, data):
    torch.manual_seed(1)
    model = Layered()
    fastlur.unlearn(model, *reversed(data), method="fine_tune", steps=30, lr=0.1, progress=False)
    before = state(model)
    settings = fastlur.methods.preset(method, preset)
    result = fastlur.unlearn(model, *data, **settings, progress=False)
    assert all(bool(torch.isfinite(value).all()) for value in state(model).values())
    moved = torch.cat([(before[name] != p).reshape(-1) for name, p in model.named_parameters()]).float().mean()
    assert float(moved) > 0.4
    for name in ("lr", "momentum", "weight_decay", "batch_size", "optimizer"):
        assert name not in settings or result.settings[name] == settings[name]
    if "epochs" in settings:  # 130 items to keep, the longer side
        assert len(result.history["step"]) == settings["epochs"] * -(-130 // settings.get("batch_size", 128))
    assert result.settings["method"] == {"name": method, **settings["method"].settings()}


# Least error on the data to forget and largest on those to keep, in percent, of the presets that name no layers; what
# their docs say of digits.
DIGITS = {
    "boundary_expand": {"class": (0, 5), "mislabelled": (40, 3)},
    "boundary_shrink": {"class": (30, 10), "mislabelled": (80, 5)},
    "gru": {"class": (95, 5), "mislabelled": (80, 60)},
    "l1_sparse": {"class": (95, 3), "mislabelled": (95, 3)},
    "mox": {"class": (0, 3), "mislabelled": (0, 5)},  # made for language models, and harmless here
    "scrub": {"class": (95, 3), "mislabelled": (90, 3)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scene", ["class", "mislabelled"])
@pytest.mark.parametrize("method", DIGITS)
def test_what_it_leaves_of_a_model_is_what_its_docs_say(method, scene, trained):  # noqa: F811
    job, given = trained[scene]
    for name in METHODS[method].presets:
        model = copy.deepcopy(given)
        fastlur.unlearn(model, job.forget, job.retain, **fastlur.methods.preset(method, name), progress=False)
        least, most = DIGITS[method][scene]
        assert error(model, job.forget) >= least and error(model, job.retain) <= most, name


def test_what_was_read_of_lur_is_what_its_presets_say():
    for name, (sparsity, layers) in {
        "cifar10": (0.97, ("layer3.*", "layer4.*", "fc.*")),
        "cifar100_random10": (0.99, ("layer4.*", "fc.*")),
        "cifar100_random50": (0.90, ("layer4.*", "fc.*")),
    }.items():
        found = fastlur.methods.preset("lur", name)
        assert found.pop("method") == fastlur.LUR(
            inner_lr=0.01, gradient="exact", trim=Trim(sparsity, layers), normalize_by="own"
        )
        assert found.pop("forget_loss") is negative_cross_entropy
        assert found.pop("lr") in (0.1, 0.05, 0.01, 0.005)
        assert found == {"epochs": 10, "momentum": 0.9, "weight_decay": 0.0, "max_grad_norm": math.inf}


def test_what_was_read_of_mox_is_what_its_presets_say():
    for name, momentum in {"llm": 1.0, "llm_momentum": 0.675}.items():
        found = fastlur.methods.preset("mox", name)
        assert found.pop("method") == METHODS["mox"](alpha=4.0, momentum=momentum)
        assert found == {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 0.01, "batch_size": 32, "epochs": 10}


def test_a_preset_is_not_changed_by_who_takes_it():
    taken = fastlur.methods.preset("lur", "cifar10")
    taken["lr"] = 7.0
    assert fastlur.methods.preset("lur", "cifar10")["lr"] == 0.01
    assert isinstance(METHODS["lur"].presets["cifar10"]["method"], dict)


def test_an_unknown_one_is_refused_with_the_nearest():
    with pytest.raises(fastlur.ArgumentError, match="cifar10"):
        fastlur.methods.preset("lur", "cifar1")
    with pytest.raises(fastlur.ArgumentError, match="it has none"):
        fastlur.methods.preset("ltu", "cifar10")
    with pytest.raises(fastlur.ArgumentError, match="did you mean 'salun'"):
        fastlur.methods.preset("sulan", "cifar10")


def test_layers_of_another_model_are_refused_not_ignored(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(fastlur.ModelError, match="matches no parameter"):
        fastlur.unlearn(model, *data, **fastlur.methods.preset("lur", "cifar10"), progress=False)
