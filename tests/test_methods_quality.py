"""With their defaults the methods forget a class of digits and keep the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastlur
from fastlur import demo, methods
from fastlur.losses import cross_entropy

FORGET = {  # least error on the forgotten class, and least accuracy on the rest, both in percent
    "bad_teacher": (90, 97),
    "boundary_expand": (90, 97),
    "boundary_shrink": (90, 97),
    "eupmu": (90, 97),
    "gru": (90, 97),
    "neggrad_plus": (90, 97),
    "pcgrad": (90, 97),
    "scrub": (90, 97),
}
DRIFT = ("fine_tune", "l1_sparse")


@pytest.fixture(scope="module")
def job() -> demo.Scenario:
    return demo.scenario("class", 0)


@pytest.fixture(scope="module")
def trained(job) -> nn.Module:
    torch.manual_seed(0)
    everything = (torch.cat([job.forget[0], job.retain[0]]), torch.cat([job.forget[1], job.retain[1]]))
    model = demo.residual_cnn(width=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(8):
        for rows in torch.split(torch.randperm(len(everything[1])), 64):
            optimizer.zero_grad()
            cross_entropy(model, tuple(part[rows] for part in everything)).backward()
            optimizer.step()
    return model.eval()


def test_the_model_knew_what_is_to_be_forgotten(job, trained):
    before = demo.judge(trained, job)
    assert before.ua < 5
    assert before.ra > 97


@pytest.mark.parametrize("name", FORGET)
def test_a_class_goes_and_the_rest_stays(name, job, trained):
    model = copy.deepcopy(trained)
    fastlur.unlearn(model, job.forget, job.retain, method=name, steps=60, batch_size=64, progress=False)
    after = demo.judge(model, job)
    least_ua, least_ra = FORGET[name]
    assert after.ua >= least_ua, after
    assert after.ra >= least_ra, after


@pytest.mark.parametrize("name", DRIFT)
def test_drift_keeps_the_rest_and_forgets_nothing(name, job, trained):
    model = copy.deepcopy(trained)
    fastlur.unlearn(model, job.forget, job.retain, method=name, steps=30, batch_size=64, progress=False)
    after = demo.judge(model, job)
    assert after.ra >= 97
    assert after.ua < 50


def test_the_brakes_of_ascent_save_the_rest_where_the_published_form_ruins_it(job, trained):
    kept = {}
    for bounded in (True, False):
        model, method = copy.deepcopy(trained), methods.GradientAscent(bounded=bounded)
        fastlur.unlearn(model, job.forget, job.retain, method=method, steps=40, batch_size=64, progress=False)
        kept[bounded] = demo.judge(model, job).ra
    assert kept[True] > 85
    assert kept[False] < 60
