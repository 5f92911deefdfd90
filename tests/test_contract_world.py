"""The caller's world is left alone, and odd uses are either served or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from helpers import blobs, images, mlp, run, same, state
from torch import nn

import fastlur


class TestOptimizersOfTheCallers:
    def test_only_the_chosen_parameters_move_whatever_gradients_lie_around(self):
        model = mlp()
        model(torch.randn(4, 6)).sum().backward()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
        start = state(model)
        run(model, blobs(16), blobs(16), optimizer=optimizer, parameters="3.*")
        now = state(model)
        assert torch.equal(now["0.weight"], start["0.weight"])
        assert not torch.equal(now["3.weight"], start["3.weight"])

    def test_a_bad_step_writes_nothing(self):
        model = mlp()
        x, y = blobs(8)
        with fastlur.MetaStep(model, optimizer=torch.optim.Adam(model.parameters(), 0.1)) as step:
            step((x, y), (x, y))
            start = state(model)
            with pytest.raises(fastlur.NonFiniteError, match="step 2"):
                step((x, y), (x * float("nan"), y))
        assert same(state(model), start)

    def test_its_learning_rate_is_its_own(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.07)
        with pytest.raises(fastlur.ArgumentError, match="lr=5: the optimizer"):
            run(model, blobs(8), blobs(8), optimizer=optimizer, lr=5)
        result = run(model, blobs(8), blobs(8), optimizer=optimizer)
        assert result.history["lr"] == [0.07] * 3

    def test_one_that_cannot_work_is_refused(self):
        model = mlp()
        with pytest.raises(fastlur.ArgumentError, match="LBFGS needs a closure"):
            run(model, blobs(8), blobs(8), optimizer=torch.optim.LBFGS(model.parameters()))

    def test_refusing_leaves_gradients_alone(self):
        model = mlp()
        model(torch.randn(4, 6)).sum().backward()
        with pytest.raises(fastlur.ArgumentError):
            fastlur.MetaStep(model, optimizer="adamv")
        assert all(p.grad is not None for p in model.parameters())


class TestOddUses:
    def test_a_model_open_in_one_step_is_refused_by_another(self):
        model = mlp()
        with fastlur.MetaStep(model), pytest.raises(fastlur.ModelError, match="open in another step"):
            run(model, blobs(8), blobs(8))
        run(model, blobs(8), blobs(8))

    def test_a_buffer_over_the_memory_of_a_weight_is_refused(self):
        model = mlp()
        model.register_buffer("alias", model[0].weight.data)
        with pytest.raises(fastlur.ModelError, match="share memory"):
            run(model, blobs(8), blobs(8))

    def test_steps_made_and_closed_in_inference_mode_leave_a_model_that_trains(self):
        model = mlp()
        with torch.inference_mode():
            step = fastlur.MetaStep(model)
            step(blobs(8), blobs(8))
            step.close()
        model(torch.randn(4, 6)).sum().backward()

    def test_a_callback_that_changes_the_mode_changes_it_for_the_run_only(self, cnn):
        for training in (True, False):
            cnn.train(training)
            run(cnn, callbacks=[lambda e: e.model.train(not e.model.training) and None])
            assert cnn.training == training

    def test_passes_run_in_train_mode_also_of_a_model_in_eval_mode(self):
        model = mlp(dropout=0.5).eval()
        seen = []

        def loss(m, batch):
            seen.append(m.training and m[2].training)
            return fastlur.losses.cross_entropy(m, batch)

        run(model, blobs(8), blobs(8), loss=loss, forget_loss=loss, method=fastlur.LUR(gradient="secant"))
        assert all(seen)
        assert not model[2].training

    def test_an_update_that_overflows_is_not_passed_off_as_done(self):
        model, (x, y) = mlp().half(), blobs(16)
        before = state(model)
        with pytest.raises(fastlur.NonFiniteError, match="step 1: the update would overflow float16"):
            run(model, (x[:8].half(), y[:8]), (x[8:].half(), y[8:]), steps=1, lr=1e6)
        assert same(state(model), before)

    def test_exact_says_what_it_cannot_do(self):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = mlp()

            def forward(self, x):
                return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

        model = Checkpointed()
        start = state(model)
        with pytest.raises(fastlur.ModelError, match="gradient='exact' cannot differentiate"):
            run(model, blobs(8), blobs(8), method=fastlur.LUR(gradient="exact"))
        assert same(start, state(model))
        run(model, blobs(8), blobs(8), method=fastlur.LUR(gradient="secant"))

    def test_no_hook_and_no_gradient_stays_behind(self):
        model = mlp()
        model(torch.randn(4, 6)).sum().backward()
        run(model, blobs(8), blobs(8))
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


class TestWorld:
    def test_random_state_modes_and_grad_mode_are_restored(self, cnn):
        import random

        import numpy as np

        cnn.train()
        cnn[3].eval()
        modes = [m.training for m in cnn.modules()]
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        data = images(12), images(20)
        after_making = torch.get_rng_state()
        with torch.no_grad():
            run(cnn, *data)
            assert not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), after_making)
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
        assert [m.training for m in cnn.modules()] == modes
        assert all(p.requires_grad and p.grad is None for p in cnn.parameters())

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
    def test_the_result_does_not_depend_on_the_context(self, cnn, context):
        twin = copy.deepcopy(cnn)
        data = images(12), images(20)
        run(cnn, *data)
        with context():
            run(twin, *data)
        assert same(state(cnn), state(twin))

    def test_hooks_survive(self, cnn):
        seen = []
        handle = cnn[0].register_forward_hook(lambda *_: seen.append(1))
        run(cnn)
        count = len(seen)
        cnn(images(2)[0])
        assert count > 0
        assert len(seen) == count + 1
        handle.remove()

    def test_gradients_of_others_are_not_touched(self, cnn):
        bystander = torch.ones(3, requires_grad=True)

        def loss(model, batch):
            return fastlur.losses.cross_entropy(model, batch) + 0 * bystander.sum()

        run(cnn, loss=loss)
        assert bystander.grad is None
