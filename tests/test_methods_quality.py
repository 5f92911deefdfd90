"""Every method forgets and keeps on real data with its defaults: digits, one class and memorised wrong labels."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import run
from torch import nn
from torch.nn import functional

import fastlur
from fastlur.demo import SCENARIOS, Scenario, scenario
from fastlur.methods import METHODS

STEPS = 60

# Least error on the data to forget and largest on those to keep, in percent; None: nothing is asked but an end. First
# for all, then what differs, with the reason.
ASKED = {"class": (95, 5), "mislabelled": (70, 5)}
FADES = "keeping on training does not forget by itself, and that is what it is here to show"
OTHERWISE = {
    ("gradient_ascent", "class"): (90, 12, "nothing holds what is to be kept but the brakes"),
    ("gradient_ascent", "mislabelled"): (40, 15, "the brakes hold before scattered labels are gone"),
    **{(name, scene): (None, None, FADES) for name in ("fine_tune", "l1_sparse") for scene in SCENARIOS},
    ("ssd", "class"): (95, 12, "α wants to be chosen for each model; there is no training to repair anything"),
    ("ssd", "mislabelled"): (None, None, "what scattered wrong labels lean on is what every item leans on"),
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[Scenario, nn.Module]]:
    """A network that has learned everything of each scenario, the wrong labels too."""
    found = {}
    for name in SCENARIOS:
        torch.manual_seed(0)
        job, model = scenario(name, 0), network()
        inputs, labels = (torch.cat(pair) for pair in zip(job.forget, job.retain, strict=True))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(40):
            for batch in torch.randperm(len(labels)).split(128):
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(model(inputs[batch]), labels[batch]))
                optimizer.step()
        found[name] = job, model.eval()
        assert error(model, job.forget) < 5
    return found


def error(model, data) -> float:
    """In percent, in eval mode."""
    with torch.no_grad():
        return 100 * float((model(data[0]).argmax(-1) != data[1]).float().mean())


@pytest.mark.parametrize("scene", SCENARIOS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_it_forgets_and_keeps_with_its_defaults(name, scene, trained):
    if name == "retrain":
        pytest.skip("takes a fresh model, and refuses this one")
    job, model = trained[scene]
    model = copy.deepcopy(model)
    run(model, job.forget, job.retain, method=name, steps=STEPS, batch_size=128)
    gone, lost, *_ = OTHERWISE.get((name, scene), ASKED[scene])
    if gone is not None:
        assert error(model, job.forget) > gone
        assert error(model, job.retain) < lost
        assert error(model, job.test) < lost + 5


def test_without_its_brakes_ascent_ruins_the_model(trained):
    job, model = trained["class"]
    model = copy.deepcopy(model)
    with pytest.raises(fastlur.NonFiniteError):
        run(model, job.forget, job.retain, method=METHODS["gradient_ascent"](bounded=False), steps=STEPS)
    assert error(model, job.retain) > 40  # as it is after the last step that was finite
