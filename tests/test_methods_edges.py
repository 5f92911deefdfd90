"""Models and data at the edge of what a method can take are taken, or refused with what to do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers import blobs, mlp, run, same, state
from test_methods_sums import passes_over
from torch import nn

import fastlur
from fastlur.methods import LTU, FineTune, Trim


class Tokens(nn.Module):
    """With a class token and positions that are bare parameters, and attention that draws its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 3, 6))
        self.mix, self.head = nn.MultiheadAttention(6, 1, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.stack([x, x.flip(-1)], 1)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.mix(x, x, x)[0][:, 0])


def test_a_trim_leaves_what_nothing_says_how_to_draw():
    model = Tokens()
    before = state(model)
    run(model, blobs(12), blobs(12), method=FineTune(trim=Trim(0.0)), lr=0.0)
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert {"mix.in_proj_weight", "mix.out_proj.weight", "head.weight"} <= moved
    assert not moved & {"cls", "positions"}


class Unused(nn.Module):
    """The layer that was registered last is not used, and has one class less than the model."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        return self.used(x)


def test_a_last_layer_that_is_not_used_cannot_be_expanded():
    model = Unused()
    before = state(model)
    with pytest.raises(fastlur.ModelError, match="boundary_shrink"):
        run(model, blobs(8), blobs(8), method="boundary_expand")
    assert same(before, state(model))


def test_a_model_that_begins_in_place_can_be_shrunk():
    x, y = blobs(8)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4))
    run(model, (x.clone(), y), blobs(8), method="boundary_shrink")


@pytest.mark.parametrize(
    ("strangers", "said"),
    [
        ((torch.randn(8, 5), torch.zeros(8, dtype=torch.long)), "cannot take them"),
        ((torch.randn(8, 6), torch.full((8,), 7)), "outside the model's 4 logits"),
        ((torch.randn(8, 6), torch.full((8,), -100)), "not one has a label"),
    ],
)
def test_strangers_that_do_not_fit_are_refused(strangers, said):
    model = mlp()
    before = state(model)
    with pytest.raises(fastlur.DataError, match=f"nonmembers: .*{said}"):
        run(model, blobs(8), blobs(8), method=LTU(nonmembers=strangers))
    assert same(before, state(model))


def test_a_fraction_of_the_retain_data_is_the_one_that_was_written():
    passes = passes_over(mlp(), blobs(100), 1)
    assert len(LTU(retain_fraction=0.07).prepare(passes).held) == 7


@pytest.mark.parametrize("made", [[True], torch.ones(3), {"a": 1}, None])
def test_a_mask_that_is_no_vector_is_refused_by_name(made):
    with pytest.raises(fastlur.ArgumentError, match="mask: returned a"):
        run(mlp(), blobs(8), blobs(8), method=FineTune(mask=lambda passes: made))


@pytest.mark.parametrize("found", [lambda state: None, lambda state: state.gradient])
def test_a_direction_that_is_none_is_refused_by_name(found):
    class Mine(FineTune):
        def direction(self, passes, state):
            super().direction(passes, state)
            return found(state)

    with pytest.raises(fastlur.ArgumentError, match="direction of Mine must return a Direction"):
        run(mlp(), blobs(8), blobs(8), method=Mine())


def test_shadows_without_their_membership_are_refused():
    with pytest.raises(fastlur.ArgumentError, match="shadows: must be a list of pairs"):
        fastlur.likelihood_ratio_attack(mlp(), blobs(8), shadows=[mlp()])


def test_one_logit_cannot_be_guessed_at():
    x = torch.randn(8, 6)
    with pytest.raises(fastlur.DataError, match="at least two classes"):
        run(
            nn.Linear(6, 1),
            (x, torch.zeros(8, dtype=torch.long)),
            (x + 1, torch.zeros(8, dtype=torch.long)),
            method="gradient_ascent",
        )


def test_type_checkers_see_every_method():
    tree = ast.parse(Path(fastlur.methods.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    named = {(node.module, alias.asname) for node in block.body for alias in node.names}
    assert named == {(recipe.__module__, recipe.__name__) for recipe in fastlur.methods.METHODS.values()}
