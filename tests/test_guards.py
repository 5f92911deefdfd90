"""Guards: what is not finite is named, and a budget on the retain loss holds for the model that comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import MODES, blobs, mlp, run, same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.losses import cross_entropy
from fastlur.methods import METHODS, Trim

STEPPING = [name for name in sorted(METHODS) if METHODS[name].steps != 0]


class Spoils(nn.Module):
    """Gives NaN gradients to its weight from a certain forward on, while its output stays right."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.armed = False

    def forward(self, x):
        weight = self.second.weight
        if self.armed:
            weight = Spoils.Function.apply(weight)
        return self.third(torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), weight, self.second.bias)))


def loss_that(spoils, side, at):
    """A loss that becomes NaN in step `at`; `side` is the name of the argument of `unlearn`."""
    step = [0]

    def loss(model, batch):
        value = cross_entropy(model, batch)
        return value * float("nan") if step[0] == at - 1 and model.training else value

    def count(event):
        step[0] = event.step

    return {side: loss, "callbacks": [count]}


class TestNonFinite:
    @pytest.mark.parametrize(("argument", "side"), [("loss", "retain"), ("forget_loss", "forget")])
    def test_step_batch_and_tensor_are_named(self, argument, side):
        model, forget, retain = mlp(), blobs(24), blobs(40)
        with pytest.raises(fastlur.NonFiniteError) as caught:
            run(model, forget, retain, steps=9, method=fastlur.LUR(gradient="secant"), **loss_that(mlp, argument, 4))
        error = caught.value
        assert (error.step, error.sides, error.tensor) == (4, (side,), "0.weight")
        said = str(error)
        assert f"step 4: {side}_loss is not finite" in said
        assert f"first in ∇({side} loss) for '0.weight' and 3 more" in said
        assert "the model is as after step 3" in said
        assert "\n" not in said
        named = said.split(f"{side} batch: items ")[1].split(";")[0]
        items = [int(each) for each in named.split(", ")]
        x = (forget if side == "forget" else retain)[0]
        seen = []

        def look(model, batch):
            seen.append(batch[0])
            return cross_entropy(model, batch)

        run(mlp(), forget, retain, steps=4, method=fastlur.LUR(gradient="first_order"), **{argument: look})
        assert torch.equal(seen[-1][: len(items)], x[items])

    def test_a_gradient_names_the_parameter(self):
        model, good = Spoils(), []

        def arm(event):
            good.append(state(event.model))
            event.model.armed = event.step == 2

        with pytest.raises(fastlur.NonFiniteError) as caught:
            run(model, blobs(24), blobs(40), steps=9, callbacks=[arm])
        assert caught.value.tensor == "second.weight"
        assert "loss) for 'second.weight';" in str(caught.value)
        assert same(state(model), good[-1])

    @pytest.mark.parametrize("gradient", MODES)
    def test_what_is_noticed_late_is_named_all_the_same(self, gradient, monkeypatch):
        """On a GPU the host looks every 32 steps, when direction and batch of the bad step are long gone."""
        model, good = Spoils(), []
        monkeypatch.setattr("fastlur.step.Step.check", lambda *_: None)

        def arm(event):
            if event.step == 3:
                good.append(state(event.model))
            event.model.armed = event.step == 3
            if event.step == 9:
                event.model.armed = True  # as it was then
                monkeypatch.undo()

        method = fastlur.LUR(gradient=gradient)
        with pytest.raises(fastlur.NonFiniteError) as caught:
            run(model, blobs(24), blobs(40), steps=9, callbacks=[arm], method=method)
        assert caught.value.step == 4
        assert caught.value.tensor == "second.weight"
        assert "retain batch: items " in str(caught.value)
        assert same(state(model), good[0])

    def test_what_is_noticed_late_is_looked_for_in_the_batch_of_that_step(self, monkeypatch):
        model, forget, retain = Spoils(), blobs(24), blobs(40)
        model.register_forward_pre_hook(lambda module, args: setattr(module, "armed", bool((args[0] > 90).any())))
        monkeypatch.setattr("fastlur.step.Step.check", lambda *_: None)
        retain[0][17, 2] = 99.0
        with pytest.raises(fastlur.NonFiniteError) as caught:
            run(model, forget, retain, steps=9, callbacks=[lambda event: event.step == 9 and monkeypatch.undo()])
        assert (caught.value.sides, caught.value.tensor) == (("retain",), "second.weight")
        assert "17" in str(caught.value).split("retain batch: items ")[1].split(";")[0].split(", ")

    @pytest.mark.parametrize("name", STEPPING)
    def test_every_method_names_the_step_and_a_tensor_and_stays_as_it_was(self, name):
        model, good = Spoils(), []

        def arm(event):
            good.append(state(event.model))
            event.model.armed = event.step == 2

        with pytest.raises(fastlur.NonFiniteError, match="step 3: ") as caught:
            run(model, blobs(24), blobs(40), steps=9, callbacks=[arm], method=name)
        assert caught.value.tensor == "second.weight"
        assert same(state(model), good[-1])

    def test_a_batch_from_a_loader_is_named_by_its_place(self):
        loader = DataLoader(TensorDataset(*blobs(40)), 8)
        with pytest.raises(fastlur.NonFiniteError, match="retain batch: number 2 of epoch 2; "):
            run(mlp(), blobs(24), loader, steps=9, **loss_that(mlp, "loss", 7))

    def test_in_a_loop_of_ones_own_a_batch_that_is_not_finite_is_named(self):
        model = mlp()
        x, y = blobs(8)
        with fastlur.MetaStep(model) as step:
            step((x, y), (x, y))
            before = state(model)
            with pytest.raises(
                fastlur.NonFiniteError, match="the retain batch itself holds a value that is not"
            ) as one:
                step((x, y), (x * float("inf"), y))
            assert one.value.sides == ("retain",)
            assert "step 2" in str(one.value)
            assert same(state(model), before)

    def test_a_forget_batch_is_not_blamed_for_statistics_that_it_was_lent(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        x, y = blobs(16)
        for spoiled in ("retain", "forget"):
            batches = {side: (x * float("nan") if side == spoiled else x, y) for side in ("forget", "retain")}
            with fastlur.MetaStep(model) as step, pytest.raises(fastlur.NonFiniteError) as one:
                step(batches["forget"], batches["retain"])
            assert one.value.sides == (spoiled,)
            assert f"the {spoiled} batch itself holds a value that is not" in str(one.value)

    def test_with_a_checkpoint_weights_that_somebody_ruined_are_put_back(self, tmp_path):
        model, seen = mlp(), {}

        def ruin(event):
            seen[event.step] = state(event.model)
            if event.step == 5:
                event.model[0].weight.data[0, 0] = float("inf")

        with pytest.raises(fastlur.NonFiniteError) as caught:
            run(model, blobs(24), blobs(40), steps=9, checkpoint=tmp_path, checkpoint_every=2, callbacks=[ruin])
        assert caught.value.__notes__ == ["the model was put back to the checkpoint of step 4"]
        assert same(state(model), seen[4])


def budget(limit, method, lr=0.05, steps=60, model=None, **more):
    """A run under a budget: the model as given, as it came back, the result, the loss before and after."""
    torch.manual_seed(3)
    forget, retain = blobs(24), blobs(40)
    given = learned(forget, retain) if model is None else model
    model = copy.deepcopy(given)
    options = {"steps": steps, "lr": lr, "schedule": "constant", "max_retain_loss_increase": limit}
    result = run(model, forget, retain, method=method, **options, **more)

    def loss(of):
        was = of.training
        of.eval()
        with torch.no_grad():
            value = float(cross_entropy(of, retain))
        of.train(was)
        return value

    return given, model, result, loss(given), loss(model)


def learned(*data):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        sum(cross_entropy(model, each) for each in data).backward()
        optimizer.step()
    return model.eval()


class TestRetainBudget:
    @pytest.mark.filterwarnings("ignore:MOX")  # which finds no weights that it may extrapolate to
    @pytest.mark.parametrize("name", sorted(set(METHODS) - {"retrain"}))  # which refuses a model that is trained
    def test_whatever_the_method_the_model_that_comes_back_is_within_it(self, name):
        _, _, _, before, after = budget(0.05, name, lr=0.5 if METHODS[name].steps != 0 else None)
        assert after <= before + 0.05 + 1e-6

    def test_a_method_without_steps_is_undone_where_it_goes_too_far(self):
        given, model, result, before, _ = budget(1e-4, fastlur.methods.SSD(alpha=0.1, dampening=0.1), lr=None)
        assert "rolled back to the model as given" in result.ended
        assert f"rose from {before:.4g} to" in result.ended
        assert same(state(model), state(given))
        _, model, result, before, after = budget(50.0, fastlur.methods.SSD(alpha=0.1, dampening=0.1), lr=None)
        assert result.ended == "all steps done"
        assert after > before + 1e-4

    def test_what_it_was_rolled_back_to_is_said(self):
        seen = {}

        def ruin(event):
            seen[event.step] = state(event.model)
            if event.step == 15:
                event.model[3].weight.data.mul_(-5)

        said = "rolled back to the state after step 10, the last that was looked at and within the budget"
        for stop in (None, lambda event: event.step == 17):  # noticed at the next look, or at the end
            options = {"lr": 1e-6, "callbacks": [ruin], "stop": stop}
            _, model, result, _, _ = budget(0.3, "fine_tune", **options)
            assert result.ended.endswith(said)
            assert same(state(model), seen[10])

    def test_the_rise_is_counted_from_the_model_as_given_not_as_trimmed(self):
        trimmed = fastlur.LUR(trim=Trim(0.0))
        given, model, result, before, _ = budget(0.0, trimmed, lr=0.0, steps=20)
        assert result.ended.endswith("rolled back to the model as given")
        assert f"rose from {before:.4g} to" in result.ended
        assert same(state(model), state(given))
        assert len(result.history["step"]) == 10

    def test_what_a_method_does_after_the_last_step_counts_too(self):
        method = fastlur.methods.MOX(alpha=1000.0)
        given, model, result, _, _ = budget(0.5, method, lr=0.01, steps=5)
        assert "rolled back to the model as given" in result.ended
        assert same(state(model), state(given))
        _, moved, result, _, _ = budget(1e9, method, lr=0.01, steps=5)
        assert result.ended == "all steps done"
        assert not same(state(moved), state(given))

    def test_a_model_whose_loss_is_not_finite_to_begin_with_has_no_budget(self):
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
        model[0].running_mean[2] = float("nan")
        with pytest.raises(fastlur.DataError, match="loss: is nan on the retain data in eval mode"):
            budget(0.1, "lur", model=model)

    def test_buffers_are_put_back_too(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        given, model, result, _, _ = budget(0.0, "gradient_ascent", lr=5.0, model=model)
        assert "rolled back" in result.ended
        assert same(state(model), state(given))

    @pytest.mark.parametrize("limit", [True, "1", float("nan"), -0.1, 10**400])
    def test_what_is_no_limit_is_refused_before_anything_else(self, limit):
        with pytest.raises(fastlur.ArgumentError, match="max_retain_loss_increase="):
            run(mlp(), blobs(8), blobs(8), max_retain_loss_increase=limit)


def test_where_preparing_fails_the_model_is_as_given():
    class Fails(fastlur.LUR):
        def prepare(self, passes):
            raise RuntimeError("on the way")

    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    before = state(model)
    with pytest.raises(RuntimeError, match="on the way"):
        run(model, blobs(24), blobs(40), method=Fails(trim=Trim(0.0)))
    assert same(state(model), before)

    class Half(nn.Linear):
        def reset_parameters(self):
            super().reset_parameters()
            if getattr(self, "ready", False):
                raise RuntimeError("no more")

    model = nn.Sequential(nn.Linear(6, 5), Half(5, 4))
    model[1].ready, before = True, state(model)
    with pytest.raises(fastlur.ModelError, match="reset_parameters"):
        run(model, blobs(24), blobs(40), method=fastlur.methods.Retrain(reinitialise=True))
    assert same(state(model), before)
