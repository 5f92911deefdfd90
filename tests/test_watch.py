"""A long run holds no more at its end than at its beginning, but for its history: a number a column and step.

`make check-slow` makes 10,000 steps of five kinds and 1,000 of every other method; what was found is printed, and the
docs quote it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from watching import SETTLED

from fastlur.history import COLUMNS
from fastlur.methods import METHODS

if not Path("/proc/self/statm").exists():
    pytest.skip("the kernel's own account of a process is not to be had here", allow_module_level=True)

STEPPING = [name for name in sorted(METHODS) if METHODS[name].steps != 0 and name != "retrain"]
LONG = ("lur", "MetaStep", "scissorhands", "ltu", "mox")  # of each kind of state one
A_NUMBER = 40  # bytes of one in a list: the object, its place, and room for more
SLACK = 3 << 20  # bytes that allocators keep


def watched(method, steps):
    program = [sys.executable, str(Path(__file__).with_name("watching.py")), method, str(steps)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    looks = json.loads(done.stdout)[SETTLED:]
    first, last = looks[0], looks[-1]
    made = steps * (len(looks) - 1) // (len(looks) - 1 + SETTLED + 1)
    history = 0 if method == "MetaStep" else made * len(COLUMNS) * A_NUMBER
    grown = last["resident"] - first["resident"]
    assert last["tensors"] <= first["tensors"]
    assert last["tensor bytes"] <= first["tensor bytes"]
    assert last["objects"] <= first["objects"] + 50  # numbers are none that the collector counts
    assert grown <= history + SLACK
    print(
        f"\n{method}: {steps} steps; from step {steps - made} on {grown / 2**20:+.1f} MiB resident, of which the "
        f"history may take {history / 2**20:.1f}; {last['tensors'] - first['tensors']:+d} tensors, "
        f"{last['tensor bytes'] - first['tensor bytes']:+d} bytes in them"
    )


def test_a_run_does_not_grow():
    watched("lur", 600)


@pytest.mark.slow
@pytest.mark.parametrize("method", LONG)
def test_ten_thousand_steps_do_not_grow(method):
    watched(method, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in STEPPING if name not in LONG])
def test_nor_do_a_thousand_of_the_others(method):
    watched(method, 1_000)
