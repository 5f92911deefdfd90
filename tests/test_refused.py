"""Arguments of the functions around a run that cannot be meant: one line of the package's own, whatever they are."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import blobs, mlp, run

import fastlur

MODEL, DATA = mlp(), blobs(8)
ODD = [5, "x", [5], [(MODEL, [True] * 8, 1)], np.ones(3)]
CALLS = {
    **{f"verify({odd!r})": lambda odd=odd: fastlur.verify(odd) for odd in (None, 5, [])},
    **{f"record.read({odd!r})": lambda odd=odd: fastlur.record.read(odd) for odd in (None, 5, [])},
    **{f"shadows {i}": lambda o=o: fastlur.likelihood_ratio_attack(MODEL, DATA, shadows=o) for i, o in enumerate(ODD)},
    "train": lambda: fastlur.likelihood_ratio_attack(MODEL, DATA, train=5),
    "pooled": lambda: fastlur.likelihood_ratio_attack(MODEL, DATA, shadows=[(MODEL, [True] * 8)], pooled="x"),
    "estimate": lambda: fastlur.estimate(MODEL, DATA, loss=np.ones(3)),
    "estimate's other": lambda: fastlur.estimate(MODEL, DATA, forget_loss=5),
    "unlearn": lambda: fastlur.unlearn(MODEL, DATA, blobs(9), loss=np.ones(3)),
    "MetaStep": lambda: fastlur.MetaStep(MODEL, np.ones(3)),
    "relearning": lambda: fastlur.audit.relearning([], DATA),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_cannot_be_meant_is_refused(case):
    with pytest.raises(fastlur.FastlurError) as caught:
        CALLS[case]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", [None, 5, []])
def test_a_record_is_loaded_into_a_model(tmp_path, odd):
    record = fastlur.record.read(run(mlp(), blobs(12), blobs(20)).save(tmp_path))
    with pytest.raises(fastlur.ModelError, match=r"is no torch\.nn\.Module"):
        record.load(odd)
