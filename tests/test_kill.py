"""A run that is killed again and again, and made again each time, ends like one that was left alone.

`make check-slow` has the long forms. What was counted is printed; the docs quote it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest
from killing import EVERY, Reaper, moment

from fastlur.folder import Folder
from fastlur.methods import METHODS


def kill_until_done(tmp_path, method, kills, seed):
    """Returns the reaper of a run killed `kills` times, whose result was the same as that of one left alone."""
    drawn = random.Random(seed)
    reaper = Reaper(method, steps=kills * 2 * EVERY + EVERY + 2)
    try:
        assert reaper.live(tmp_path / "left alone", tmp_path / "expected")
        reaper.furthest = 0
        while reaper.kills < kills:
            assert not reaper.live(tmp_path / "killed", tmp_path / "found", moment(drawn)), "it was done too early"
        assert reaper.live(tmp_path / "killed", tmp_path / "found")
    finally:
        reaper.close()
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    assert len(reaper.redone) == kills
    assert all(0 <= steps <= EVERY for steps in reaper.redone)
    print(
        f"\n{method}: {reaper.kills} kills, {reaper.while_writing} of them during a write, {sum(reaper.redone)} steps "
        f"made again, at most {max(reaper.redone)} after one kill (checkpoints every {EVERY})"
    )
    return reaper


def test_a_killed_run_ends_like_one_left_alone(tmp_path):
    kill_until_done(tmp_path, "lur", kills=8, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in sorted(METHODS) if METHODS[name].steps != 0])
def test_so_does_one_of_every_method(tmp_path, method):
    kill_until_done(tmp_path, method, kills=4, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lur", "scissorhands", "ltu", "mox"])
def test_a_run_killed_dozens_of_times_ends_like_one_left_alone(tmp_path, method):
    reaper = kill_until_done(tmp_path, method, kills=80, seed=2)
    assert reaper.kills >= 50
    assert reaper.while_writing >= 10


WORKERS = """
import os, signal, sys, torch, fastlur
from torch.utils.data import DataLoader, TensorDataset
def loader(count):
    items = TensorDataset(torch.arange(3.0 * count).view(count, 3), torch.arange(count) % 2)
    return DataLoader(items, 4, num_workers=2)
def kill(event):
    print(event.step, flush=True)
    if event.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
torch.manual_seed(0)
fastlur.unlearn(torch.nn.Linear(3, 2), loader(20), loader(40), steps=8, checkpoint=sys.argv[1], checkpoint_every=2,
                callbacks=[kill], progress=False, allow_overlap=True, lr=1e-3)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked there")
def test_a_killed_run_does_not_leave_its_lock_to_the_workers_of_its_loaders(tmp_path):
    """They outlive it by seconds; whoever makes the call again at once is let in."""
    arguments = [sys.executable, "-c", WORKERS, str(tmp_path)]
    with subprocess.Popen([*arguments, "5"], stdout=subprocess.PIPE) as killed:
        killed.wait(240)
        assert killed.returncode == -signal.SIGKILL
        folder = Folder(tmp_path)
        assert folder.lock()
        folder.unlock()
    again = subprocess.run([*arguments, "0"], capture_output=True, text=True, check=True)
    assert again.stdout.split() == ["5", "6", "7", "8"]


def test_a_lock_ends_with_the_run_whoever_has_inherited_it(tmp_path):
    held, other = Folder(tmp_path), Folder(tmp_path)
    assert held.lock()
    inherited = os.dup(held._lock)
    assert not other.lock()
    held.unlock()
    assert other.lock()
    other.unlock()
    os.close(inherited)
