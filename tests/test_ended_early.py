"""A run that a rule or a budget ended and that kept its checkpoints: asked for again, it is over at once."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import go_on, job
from helpers import learnable, mlp, same, state

import fastlur
from fastlur.losses import cross_entropy
from fastlur.stopping import Reached


def fitting():
    """A model that fits its retain data, and the data of both sides."""
    torch.manual_seed(0)
    model, forget, retain = mlp(), learnable(12), learnable(40)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(model, retain).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, forget, retain


class TestEndedEarly:
    @pytest.mark.parametrize("method", ["lur", "mox"])
    @pytest.mark.filterwarnings("ignore:MOX")
    def test_a_run_that_a_rule_ended_and_that_kept_its_checkpoints_ends_at_once(self, tmp_path, method):
        looks = []
        rule = Reached(lambda model: looks.append(1) or float(len(looks)), at_least=7, every=1)
        model, data, options = job(tmp_path, keep_checkpoints=True, stop=rule, steps=30, method=method)
        args = model, data, options
        first, steps = go_on(*args)
        assert steps == [1, 2, 3, 4, 5, 6, 7]
        looks.clear()  # it would go on for seven steps more
        again, steps = go_on(*args)
        assert steps == []
        assert same(state(again), state(first))

    def test_the_reason_is_that_of_the_run(self, tmp_path):
        model, data, options = job(tmp_path, keep_checkpoints=True, stop=lambda event: event.step == 3 and "enough")
        assert fastlur.unlearn(model, *data, **options).ended == "enough"
        model, data, options = job(tmp_path, keep_checkpoints=True, stop=options["stop"])
        result = fastlur.unlearn(model, *data, **options)
        assert result.ended == "enough"
        assert result.history["step"] == [1, 2, 3]

    def test_a_budget_that_ended_it_ends_it_again(self, tmp_path):
        def go():
            options = {"lr": 5.0, "schedule": "constant", "max_retain_loss_increase": 0.01, "keep_checkpoints": True}
            model, data, options = job(tmp_path, **options, steps=40)
            with torch.no_grad():
                model[3].weight.mul_(3)
            return fastlur.unlearn(model, *data, **options)

        first, again = go(), go()
        assert "rolled back" in first.ended
        assert again.ended == first.ended
        assert again.history == first.history
        assert same(state(again.model), state(first.model))

    @pytest.mark.parametrize("method", [fastlur.methods.SSD(alpha=0.1, dampening=0.1), "gradient_ascent"])
    def test_one_that_ended_outside_its_budget_comes_back_within_it(self, tmp_path, method):
        """By a change without a step, or by a rule between two looks."""
        fitted, forget, retain = fitting()
        options = {"stop": lambda event: event.step == 7 and "enough", "lr": 30.0, "steps": 20}
        if method != "gradient_ascent":
            options = {}
        options |= {"checkpoint": tmp_path, "keep_checkpoints": True, "progress": False}
        found = []
        for _ in range(2):
            model = copy.deepcopy(fitted)
            result = fastlur.unlearn(model, forget, retain, method=method, max_retain_loss_increase=0.01, **options)
            assert result.ended.endswith("rolled back to the model as given")
            assert same(state(model), state(fitted))
            found.append(result.ended)
        assert found[0] == found[1]

    def test_nor_does_what_a_callback_does_after_the_last_look_come_back(self, tmp_path):
        """The last step's checkpoint was written before the model was put back."""
        fitted, forget, retain = fitting()

        def spoil(event):
            if event.step == event.steps:
                with torch.no_grad():
                    event.model[0].weight.mul_(-3)

        options = {"checkpoint": tmp_path, "keep_checkpoints": True, "progress": False, "callbacks": [spoil]}
        found = []
        for _ in range(2):
            model = copy.deepcopy(fitted)
            result = fastlur.unlearn(model, forget, retain, steps=4, max_retain_loss_increase=0.2, **options)
            found.append((state(model), result.ended))
        assert "rolled back to the state after step" in found[0][1]
        assert found[1][1] == found[0][1]
        assert same(found[1][0], found[0][0])
        assert cross_entropy(model, retain) <= cross_entropy(fitted, retain) + 0.2
