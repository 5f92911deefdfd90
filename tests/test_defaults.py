"""The three-argument call: no setting of its own, a small form of the study in bench/quality, on digits.

Each kind of request is judged against a network retrained without the forget set. Bounds are some twice what was found,
and what the model as given is off by is far beyond them wherever there is much to forget at all.
"""

from __future__ import annotations

import copy

import pytest
import torch
from quality.training import Bench, original, retrained

import fastlur

BENCH = Bench("cnn", "digits", epochs=20)
# scenario: the largest average gap in points, and the least that the model as given is off by
BOUNDS = {
    "random10": (2.5, 0.0),
    "class": (1.0, 20.0),
    "half_class": (6.0, 1.0),
    "mislabelled": (2.5, 10.0),
    "backdoor": (2.5, 10.0),
}


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLUR_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


@pytest.mark.parametrize("name", BOUNDS)
def test_three_arguments_come_near_the_retrained_model(name):
    job = BENCH.scenario(name, "tune2")
    given, _ = original(BENCH, name, "tune2")
    data = {"forget": job.forget, "retain": job.retain, "test": job.test}
    truth = fastlur.evaluate(retrained(BENCH, name, "tune2", 0)[0], **data)
    before = fastlur.evaluate(given, **data, reference=truth)
    model = copy.deepcopy(given)
    fastlur.unlearn(model, job.forget, job.retain)
    after = fastlur.evaluate(model, **data, reference=truth)
    print(f"\n{name}: gap {before.gap:.2f} before, {after.gap:.2f} after; {before}\n{after}\n{truth}")
    most, least_before = BOUNDS[name]
    assert after.gap < most
    assert before.gap >= least_before
    assert all(torch.isfinite(p).all() for p in model.parameters())
