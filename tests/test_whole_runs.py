"""What the benchmark of whole runs concludes from its runs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from whole import ARMS, CLEANED, LUR, PUBLISHED, mislabelled, verdict

from fastlur import demo


def made(arm, gap, seconds, rate=1.0, steps=10, seed=0):
    return {"arm": arm, "rate": rate, "steps": steps, "seed": seed, "gap": gap, "seconds": seconds}


class TestVerdict:
    def test_the_gaps_are_the_best_of_either_side_and_round_ones(self):
        runs = [
            made(PUBLISHED, 3.0, 4.0, steps=10),
            made(PUBLISHED, 2.0, 8.0, steps=20),
            made(PUBLISHED, 2.5, 12.0, steps=30),
            made(LUR, 2.1, 1.0, steps=10),
            made(LUR, 1.0, 2.0, steps=20),
            made(LUR, 0.5, 3.0, steps=30),
        ]
        found = verdict(runs, [PUBLISHED, CLEANED, LUR], gaps=(3.0,))  # one of them did not run
        assert {label: (each["gap"], each["seconds"]) for label, each in found.items()} == {
            f"the best of {PUBLISHED}": (2.0, {PUBLISHED: 8.0, LUR: 2.0}),
            f"the best of {LUR}": (0.5, {PUBLISHED: None, LUR: 3.0}),
            "fixed, 3": (3.0, {PUBLISHED: 4.0, LUR: 1.0}),
        }

    def test_seeds_are_averaged_and_rates_are_not(self):
        runs = [made(CLEANED, 4.0, 2.0), made(CLEANED, 2.0, 4.0, seed=1), made(CLEANED, 5.0, 1.0, rate=3.0)]
        assert verdict(runs, [CLEANED], gaps=()) == {
            f"the best of {CLEANED}": {"gap": 3.0, "seconds": {CLEANED: 3.0}, "each": {CLEANED: [2.0, 4.0]}}
        }


def test_every_arm_is_given_a_rate_and_the_fast_forms_go_to_both_sides():
    fast = {arm for arm, (options, _) in ARMS.items() if options.get("precision") == "bf16"}
    assert {arm.split(",")[0] for arm in fast} == {"lur", "scissorhands"}
    assert all(rate > 0 for _, rate in ARMS.values())


def test_the_share_of_wrong_labels():
    train, _ = demo.digits(0)
    labels, gone = mislabelled(train, 0.05, 1)
    assert int(gone.sum()) == int(0.05 * len(labels))
    assert bool((labels[gone] != train[1][gone]).all()) and bool((labels[~gone] == train[1][~gone]).all())
    assert labels.max() < 10 and pytest.approx(0.05, abs=1e-3) == float(gone.double().mean())
