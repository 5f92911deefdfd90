"""Targets as a run makes them, and a novice that learns what there is to learn at once."""

from __future__ import annotations

import pytest
from helpers import run

import fastlur
from fastlur.targets import Novice

QUICK = Novice(epochs=20, lr=3e-2)


class Seen(Exception):
    """What a run would have gone on with."""


def made(target, model, forget, retain, **options):
    """The loss that a target makes of itself in a run."""
    found = []

    class Looking(fastlur.LUR):
        name = "looking"

        def prepare(self, passes):
            found.append(passes.losses["forget"])
            raise Seen

    with pytest.raises(Seen):
        run(model, forget, retain, method=Looking(), forget_loss=target, **options)
    return found[0]
