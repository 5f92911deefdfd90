"""What docs/methods.md and docs/evaluate.md show works as it stands there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from helpers import blobs, mlp, run, same, state

import fastlur
from fastlur.methods import METHODS, SaliencyMask, Trim

DOCS = Path(__file__).parent.parent / "docs"
TEXT, EVALUATE = ((DOCS / f"{name}.md").read_text() for name in ("methods", "evaluate"))


@pytest.fixture
def give_way():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {"__name__": __name__}  # dataclasses look their module up
    exec(compile(code, "docs/methods.md", "exec"), names)
    return names["GiveWay"]


def test_it_takes_about_twenty_lines():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 24


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_method_shown_removes_the_conflict_and_nothing_else(give_way, sign):
    """One step of plain descent against its formula in float64, with a forget loss that conflicts or agrees."""
    model, forget, retain = mlp(dtype=torch.float64), blobs(8, dtype=torch.float64), blobs(8, dtype=torch.float64)
    forget = forget[0], model(forget[0]).argmax(-1)  # confident enough to make a gradient of some size
    opposed = lambda m, batch: sign * fastlur.losses.cross_entropy(m, retain) + fastlur.losses.cross_entropy(m, batch)
    params = list(model.parameters())
    r, f = (
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])
        for loss in (fastlur.losses.cross_entropy(model, retain), 0.3 * opposed(model, forget))
    )
    before = torch.cat([p.detach().reshape(-1) for p in params])
    expected = f - min(float(r @ f), 0.0) / float(r @ r) * r
    run(model, forget, retain, method=give_way(), forget_loss=opposed, steps=1, lr=0.1)
    after = torch.cat([p.detach().reshape(-1) for p in params])
    assert (float(r @ f) < 0) == (sign < 0)
    torch.testing.assert_close((before - after) / 0.1, r + expected, rtol=1e-9, atol=1e-12)


def test_it_takes_the_parts_that_every_method_takes(give_way):
    one, two = mlp(), mlp()
    two.load_state_dict(one.state_dict())
    before, forget, retain = state(one), blobs(12), blobs(20)
    run(one, forget, retain, method=give_way(mask=SaliencyMask(0.5)), weight_decay=0.5)
    run(two, forget, retain, method=give_way(trim=Trim(0.5)))
    moved = torch.cat([(before[name] != value).reshape(-1) for name, value in state(one).items()])
    assert 0.3 < float(moved.float().mean()) <= 0.51
    assert not same(state(one), state(two))


def test_a_word_in_the_text_that_names_something_names_something_that_exists():
    for name in re.findall(r"`fastlur\.methods\.(\w+)", TEXT):
        assert hasattr(fastlur.methods, name), name
    for name in re.findall(r"`passes\.(\w+)", TEXT):
        assert hasattr(fastlur.passes.Passes, name), name


def test_the_table_is_that_of_the_methods():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (\S+) \| (\S+) \| (\S+) \| (.*?) ?\|$", TEXT, re.MULTILINE)
    wanted = []
    for name, recipe in METHODS.items():
        cost = recipe().cost
        line = recipe.__doc__.strip().splitlines()[0]
        wanted.append((name, line, *(f"{n:g}" for n in (cost.passes, cost.forwards, cost.buffers)), cost.note))
    assert rows == wanted
    assert [row[0] for row in rows] == list(fastlur.methods.available())


def test_the_presets_named_are_those_there_are():
    named = {name: re.findall(r"`(\w+)`", rest) for name, rest in re.findall(r"^- `(\w+)`: (`.*)$", TEXT, re.MULTILINE)}
    assert named == {name: list(recipe.presets) for name, recipe in METHODS.items() if recipe.presets}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_forget_loss_is_taken_or_refused_as_said(name):
    """Positive, so that each that takes one can."""
    about = TEXT[TEXT.index("Three kinds of forget loss") :].split("\n\n")[0]
    call = lambda: run(mlp(), blobs(8), blobs(8), method=name, steps=1, forget_loss=fastlur.losses.cross_entropy)
    if f"`{name}`" in about:
        call()
    else:
        with pytest.raises(fastlur.ArgumentError, match="forget_loss"):
            call()


def test_the_figures_explained_are_those_of_an_evaluation():
    table = re.findall(r"^\| (`.*?) \| ", EVALUATE, re.MULTILINE)
    named = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(fastlur.Evaluation))


def test_the_evaluation_shown_runs(capsys):
    forget, retain, test, unseen = blobs(12), blobs(24), blobs(12), blobs(12)
    shown = {"fastlur": fastlur, "torch": torch, "model": mlp(), "retrained": mlp(), "forget": forget}
    shown |= {"retain": retain, "test": test, "unseen": unseen}
    sizes = []
    shown["train_model"] = lambda inputs, targets: sizes.append(len(targets)) or mlp()
    codes = re.findall(r"```python\n(.*?)```", EVALUATE, re.DOTALL)
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "docs/evaluate.md", "exec"), shown)
    assert shown["found"].shadows == 8
    assert sizes == [24 + 12] * 8
    assert "RTE" in capsys.readouterr().out
