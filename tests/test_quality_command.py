"""`python -m bench.quality`: what its arguments ask for."""

from __future__ import annotations

import json

import pytest
import quality.__main__ as command

TINY = ("--network", "mlp", "--dataset", "digits", "--size", "120", "--epochs", "2", "--steps", "3")


@pytest.fixture
def asked(monkeypatch):
    """What `work` was called with; it says that there is something left."""
    calls = []
    monkeypatch.setattr(command, "work", lambda *arguments: bool(calls.append(arguments)))
    return calls


def test_arguments_narrow_the_grid(asked, tmp_path):
    few = ("--scenario", "class", "--arm", "lur", "--arm", "joint", "--trials", "4", "--truths", "3")
    assert command.main([*TINY, *few, "--hours", "0.5", "--cores", "1", "--results", str(tmp_path)]) == 1
    bench, grid, journal, cores, seconds = asked[0]
    assert (bench.name, bench.trained_for, bench.steps) == ("mlp-digits-120x2x3", 2, 3)
    assert (grid.scenarios, list(grid.arms), grid.trials, grid.truths) == (("class",), ["lur", "joint"], 4, 3)
    assert (cores, seconds) == (1, 1800.0)
    assert json.loads(journal.path.read_text())["key"] == "machine"


def test_nothing_left_is_success(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "work", lambda *_: True)
    assert command.main([*TINY, "--results", str(tmp_path)]) == 0


def test_an_arm_that_the_grid_has_not_is_refused(asked, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*TINY, "--arm", "nobody", "--results", str(tmp_path)])
    assert "eupmu" in capsys.readouterr().err
    assert not asked


def test_a_plan_does_nothing(asked, tmp_path, capsys):
    assert command.main([*TINY, "--plan", "--scenario", "class", "--arm", "lur", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out.split()
    assert said[said.index("trial") - 2] == "6" and said[said.index("truth") - 2] == "7"
    assert not asked and not list(tmp_path.iterdir())
