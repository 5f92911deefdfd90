"""Generated calls over the public surface: each works, or is refused by a documented error before anything changes.

`make check-slow` makes thousands of them and prints how many. What is called stands in `generated_runs`,
`generated_parts` and `generated_kept`, what odd values there are and how a call is watched in `generated`.
"""

from __future__ import annotations

import warnings

import pytest
from generated import calls
from generated_kept import aiming, attacking, estimating, recording, resuming, scoring
from generated_parts import choosing_methods, losing, making_parts, naming_methods, operating
from generated_runs import differentiating, evaluating, stepping, unlearning
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

PROPERTIES = {
    "unlearn": (unlearning, 40, 1200),
    "MetaStep": (stepping, 15, 300),
    "meta_gradient": (differentiating, 15, 300),
    "evaluate": (evaluating, 15, 300),
    "methods": (choosing_methods, 15, 400),
    "names of methods": (naming_methods, 10, 100),
    "operations": (operating, 40, 600),
    "losses": (losing, 10, 150),
    "parts": (making_parts, 15, 300),
    "records": (recording, 20, 300),
    "runs made again": (resuming, 10, 150),
    "targets": (aiming, 15, 300),
    "estimate": (estimating, 10, 200),
    "attacks": (attacking, 15, 300),
    "scores of items": (scoring, 10, 150),
}


def generate(name, count):
    """So many calls of one property, the same ones each time."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=health,
        phases=[Phase.generate],  # making a failure smaller takes minutes, and each is printed as it is
    )
    @given(st.data())
    def every(drawn):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, for some of the odd models
            PROPERTIES[name][0](drawn.draw)

    before = dict(calls)
    every()
    worked, refused, passed = (calls[kind] - before[kind] for kind in ("worked", "refused", "passed on"))
    assert worked > 0
    assert refused > 0
    print(
        f"\n{name}: {worked + refused + passed} calls, {worked} worked, {refused} were refused, {passed} raised what "
        f"a callable of the caller's raised; {sum(calls.values())} calls so far"
    )


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_call_works_or_is_refused_before_anything_changes(name):
    generate(name, PROPERTIES[name][1])


many: dict[str, int] = {}  # calls by property


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_thousands_of_calls_work_or_are_refused_before_anything_changes(name):
    before = sum(calls.values())
    generate(name, PROPERTIES[name][2])
    many[name] = sum(calls.values()) - before
    assert set(many) != set(PROPERTIES) or sum(many.values()) >= 2000
