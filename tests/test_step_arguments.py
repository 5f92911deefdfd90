"""What a step, an estimate or LUR cannot be made with is refused by name, before anything has changed."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from helpers import blobs, images, mlp, run, same, state

import fastlur
from fastlur.demo import residual_cnn

FORMATS = ["channels_last", torch.channels_last_3d, True]


@pytest.mark.parametrize("value", FORMATS)
def test_a_memory_format_is_none_or_one_for_four_dimensions(value):
    model = residual_cnn(width=4)
    before = state(model)
    with pytest.raises(fastlur.ArgumentError, match=r"memory_format=.* must be torch\.channels_last"):
        fastlur.MetaStep(model, memory_format=value)
    with pytest.raises(fastlur.ArgumentError, match=r"memory_format=.* must be torch\.channels_last"):
        fastlur.estimate(model, images(4), memory_format=value)
    assert same(state(model), before)
    fastlur.MetaStep(model, memory_format=torch.channels_last).close()  # nothing was left open


@pytest.mark.parametrize("name", ["relative_inner_lr", "keep_graph"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_the_switches_of_lur_are_true_or_false(name, value):
    with pytest.raises(fastlur.ArgumentError, match=f"{name}={value!r} must be True or False"):
        fastlur.LUR(**{name: value})
    with pytest.raises(fastlur.ArgumentError, match=name):
        fastlur.MetaStep(mlp(), **{name: value})


@pytest.mark.parametrize("name", ["compile", "capture"])
@pytest.mark.parametrize("value", ["yes", None, 2])
def test_the_switches_of_a_step_are_true_or_false(name, value):
    with pytest.raises(fastlur.ArgumentError, match=f"{name}={value!r} must be True or False"):
        fastlur.MetaStep(mlp(), **{name: value})


@pytest.mark.parametrize("name", ["loss", "forget_loss"])
def test_a_loss_can_be_called(name):
    model = mlp()
    calls = (
        lambda loss: fastlur.MetaStep(model, **loss),
        lambda loss: fastlur.estimate(model, blobs(4), **loss),
        lambda loss: run(model, blobs(8), blobs(8), **loss),
    )
    for call in calls:
        with pytest.raises(fastlur.ArgumentError, match=f"^{name}: a int cannot be called"):
            call({name: 3})


class TestSetLr:
    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "x", None, True])
    def test_no_rate_is_refused_and_the_old_one_stays(self, value):
        model, other = mlp(), mlp()
        other.load_state_dict(model.state_dict())
        batches = blobs(8), blobs(8)
        with fastlur.MetaStep(model, lr=0.1) as step, fastlur.MetaStep(other, lr=0.1) as untouched:
            with pytest.raises(fastlur.ArgumentError, match=r"lr=.* must be a finite number"):
                step.set_lr(value)
            step(*batches)
            untouched(*batches)
            assert same(state(model), state(other))

    def test_it_holds_from_the_next_step_on(self):
        model = mlp()
        with fastlur.MetaStep(model, lr=0.1) as step:
            step.set_lr(0)
            before = state(model)
            step(blobs(8), blobs(8))
            assert same(state(model), before)

    def test_an_optimizer_of_torchs_keeps_its_own(self):
        model = mlp()
        with fastlur.MetaStep(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)) as step:
            with pytest.raises(fastlur.ArgumentError, match=r"lr=0\.2: .*param_groups"):
                step.set_lr(0.2)
            assert step.update.lr == 0.1

    def test_of_a_closed_step_there_is_none(self):
        step = fastlur.MetaStep(mlp())
        step.close()
        with pytest.raises(fastlur.ModelError, match="closed"):
            step.set_lr(0.1)


def sides():
    return [(x.bfloat16(), y) for x, y in (blobs(8), blobs(8))]


class TestRounding:
    """A step that is smaller than the last bit of a weight is none, and nothing else would tell."""

    @pytest.mark.parametrize(
        ("dtype", "said"), [(torch.bfloat16, "bfloat16: .* 0.2 %"), (torch.float16, "float16: .* 0.02 %")]
    )
    def test_weights_that_move_in_half_precision_are_warned_of(self, dtype, said):
        with pytest.warns(UserWarning, match=f"parameters move in {said}"):
            fastlur.MetaStep(mlp().to(dtype)).close()

    def test_so_little_is_indeed_rounded_away_and_somewhat_more_is_not(self):
        for dtype, part in ((torch.bfloat16, 0.0019), (torch.float16, 0.00023)):
            weight = torch.rand(10_000).to(dtype)
            assert torch.equal(weight, weight + part * weight)
            assert bool((weight != weight + 5 * part * weight).all())

    def test_others_are_not(self):
        model = mlp()
        model[0].to(torch.bfloat16).requires_grad_(False)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fastlur.MetaStep(model).close()
            fastlur.MetaStep(mlp(), precision="bf16").close()
            fastlur.unlearn(mlp().bfloat16(), *sides(), method="ssd", progress=False)  # makes no steps
        assert not seen

    def test_a_novice_that_learns_in_half_precision_is_warned_of(self):
        x, y = sides()[0]
        with pytest.warns(UserWarning, match="parameters move in bfloat16"):
            fastlur.targets.Novice(epochs=1).teacher(mlp().bfloat16(), (x, y))
