"""The model leaves as it came, whatever happens in between."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
import torch.utils.checkpoint
from helpers import Attention, Point, blobs, mlp, same, state
from torch import nn

import fastlur
from fastlur.demo import residual_cnn
from fastlur.space import ParameterSpace

MODES = ("exact", "secant", "first_order", "optimistic")
ORDERS = ("retain_first", "forget_first")


def images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 1, 8, 8), torch.randint(0, 10, (n,))


def run(model, forget=None, retain=None, **options):
    options = {"steps": 3, "batch_size": 8, "progress": False} | options
    return fastlur.unlearn(model, forget or images(12), retain or images(20), **options)


@pytest.fixture
def cnn():
    return residual_cnn(width=4)


class Interrupted(Exception):
    pass


def interrupt(event):
    if event.step == 2:
        raise Interrupted


class TestParameters:
    @pytest.mark.parametrize("gradient", MODES)
    def test_same_objects_with_storage_of_their_own(self, cnn, gradient, tmp_path):
        before = dict(cnn.named_parameters())
        strides = {name: p.stride() for name, p in before.items()}
        start = state(cnn)
        run(cnn, method=fastlur.LUR(gradient=gradient))
        after = dict(cnn.named_parameters())
        assert all(after[name] is before[name] for name in before)
        assert {name: p.stride() for name, p in after.items()} == strides
        assert len({p.untyped_storage().data_ptr() for p in after.values()}) == len(after)
        assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in after.values())
        assert not same(start, state(cnn))
        file = tmp_path / "model.safetensors"
        safetensors.torch.save_file(cnn.state_dict(), file)
        other = residual_cnn(width=4)
        other.load_state_dict(safetensors.torch.load_file(file))
        assert same(state(other), state(cnn))
        assert same(state(copy.deepcopy(cnn)), state(cnn))
        cnn.double().float()

    def test_a_run_that_raises_gives_the_model_back(self, cnn):
        cnn.train()
        cnn[0].eval()
        cnn[1].weight.requires_grad_(False)
        modes = [m.training for m in cnn.modules()]
        flags = [p.requires_grad for p in cnn.parameters()]
        before = dict(cnn.named_parameters())
        with pytest.raises(Interrupted):
            run(cnn, callbacks=[interrupt], parameters="*conv*")
        after = dict(cnn.named_parameters())
        assert all(after[name] is before[name] for name in before)
        assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in after.values())
        assert [m.training for m in cnn.modules()] == modes
        assert [p.requires_grad for p in cnn.parameters()] == flags
        assert all(p.grad is None for p in cnn.parameters())
        run(cnn)

    @pytest.mark.parametrize("gradient", MODES)
    def test_a_loss_that_raises_inside_a_displaced_pass_leaves_theta_undisplaced(self, cnn, gradient):
        calls = []

        def breaks(model, batch):
            calls.append(1)
            if len(calls) == 2:
                raise Interrupted
            return fastlur.losses.negative_cross_entropy(model, batch)

        step = fastlur.MetaStep(cnn, forget_loss=breaks, gradient=gradient, inner_lr=0.5)
        step(images(8), images(8))
        start = state(cnn)
        with pytest.raises(Interrupted):
            step(images(8), images(8))
        assert same(start, state(cnn))
        step.close()
        assert same(start, state(cnn))

    def test_frozen_parameters_are_bit_identical(self, cnn):
        for name, p in cnn.named_parameters():
            p.requires_grad_("bn" not in name)
        start = state(cnn)
        run(cnn, weight_decay=0.5)
        moved = {name for name, value in state(cnn).items() if not torch.equal(value, start[name])}
        parameters = {name for name, _ in cnn.named_parameters()}
        assert moved & parameters == {name for name, p in cnn.named_parameters() if p.requires_grad}

    @pytest.mark.parametrize(
        "chosen", ["10.*", ["10.weight", "10.bias"], lambda name, p: name.startswith("10."), ("10.wei*", "*.bias")]
    )
    def test_only_the_chosen_parameters_move(self, cnn, chosen):
        start = dict(copy.deepcopy(cnn).named_parameters())
        run(cnn, parameters=chosen, weight_decay=0.1)
        moved = {name for name, p in cnn.named_parameters() if not torch.equal(p, start[name])}
        wanted = {"10.weight", "10.bias"}
        assert wanted <= moved
        assert all(name in wanted or name.endswith(".bias") for name in moved)
        assert all(p.requires_grad for p in cnn.parameters())

    def test_tied_weights_stay_tied(self):
        model = Attention()
        tokens = torch.randint(0, 11, (2, 20, 6))
        run(model, (tokens[0], tokens[1]), (tokens[1].flip(1), tokens[0].flip(1)), allow_overlap=True)
        assert model.out.weight is model.embed.weight
        assert "out.weight" in model.state_dict()

    @pytest.mark.parametrize("gradient", MODES)
    def test_objects_over_one_memory_stay_one(self, gradient):
        class Twins(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(5, 5, bias=False)
                self.b = nn.Linear(5, 5, bias=False)
                self.b.weight.data = self.a.weight.data

            def forward(self, x):
                return self.b(torch.tanh(self.a(x)))

        twins, tied = Twins(), Twins()
        tied.b.weight = tied.a.weight
        tied.load_state_dict(twins.state_dict())
        data = blobs(16, 5, 5), blobs(16, 5, 5)
        for model in (twins, tied):
            run(model, *data, method=fastlur.LUR(gradient=gradient))
        assert twins.a.weight.data_ptr() == twins.b.weight.data_ptr()
        assert twins.a.weight is not twins.b.weight
        torch.testing.assert_close(twins.a.weight, tied.a.weight)

    def test_memory_shared_with_a_frozen_parameter_is_refused(self):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        model[1].weight = nn.Parameter(model[0].weight.data, requires_grad=False)
        with pytest.raises(fastlur.ModelError, match="share memory"):
            run(model, blobs(16, 5, 5), blobs(16, 5, 5))

    @pytest.mark.parametrize("gradient", MODES)
    def test_several_dtypes(self, gradient):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(6, 8, dtype=torch.float64)
                self.b = nn.Linear(8, 4)

            def forward(self, x):
                return self.b(torch.tanh(self.a(x.double())).float())

        model = Mixed()
        start = state(model)
        run(model, blobs(16), blobs(16), method=fastlur.LUR(gradient=gradient))
        now = state(model)
        assert {k: v.dtype for k, v in now.items()} == {k: v.dtype for k, v in start.items()}
        assert all(not torch.equal(now[k], start[k]) for k in now)

    @pytest.mark.parametrize("gradient", MODES)
    def test_channels_last_weights_keep_their_strides(self, cnn, gradient):
        cnn = cnn.to(memory_format=torch.channels_last)
        plain = copy.deepcopy(cnn).to(memory_format=torch.contiguous_format)
        strides = [p.stride() for p in cnn.parameters()]
        data = images(12), images(20)
        method = fastlur.LUR(gradient=gradient)
        run(cnn, *data, method=method)
        run(plain, *data, method=method)
        assert [p.stride() for p in cnn.parameters()] == strides
        for p, q in zip(cnn.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

    def test_channels_last_on_request_is_given_back_contiguous(self, cnn):
        data = images(12), images(20)
        plain = copy.deepcopy(cnn)
        run(cnn, *data, memory_format=torch.channels_last)
        run(plain, *data)
        for p, q in zip(cnn.parameters(), plain.parameters(), strict=True):
            assert p.stride() == q.stride()
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("gradient", MODES)
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_parameters_that_no_loss_reaches_do_not_move(self, gradient, optimizer):
        model = mlp()
        model.unused = nn.Linear(3, 3)
        model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)
        start = state(model)
        run(
            model,
            blobs(16),
            blobs(16),
            method=fastlur.LUR(gradient=gradient),
            optimizer=optimizer,
            weight_decay=0.5,
            lr=0.1,
        )
        now = state(model)
        assert torch.equal(now["unused.weight"], start["unused.weight"])
        assert not torch.equal(now["0.weight"], start["0.weight"])


class TestSpace:
    def test_a_pass_at_another_point_leaves_theta_untouched(self):
        model = mlp()
        space = ParameterSpace(model)
        start = state(model)
        there = space.vector()
        for flat in there.flats:
            flat.fill_(2.0)
        with space.at(there):
            assert all(bool((p == 2).all()) for p in model.parameters())
        assert same(start, state(model))
        space.close()
        assert same(start, state(model))

    def test_a_storage_replaced_behind_its_back_is_noticed(self):
        model = mlp()
        with fastlur.MetaStep(model) as step:
            step(blobs(8), blobs(8))
            model.double()
            with pytest.raises(fastlur.ModelError, match=r"storage of '0\.weight' was replaced"):
                step(blobs(8), blobs(8))

    def test_a_closed_step_says_so(self):
        step = fastlur.MetaStep(mlp())
        step.close()
        with pytest.raises(fastlur.ModelError, match="closed"):
            step(blobs(8), blobs(8))

    def test_autocast_sees_the_displaced_weights(self):
        """Autocast caches cast weights; a cache filled at θ must not serve the pass at θ − αd."""
        x, y = blobs(16)
        inner_lr = 2.0
        found = {}
        for gradient in ("first_order", "exact"):
            model = mlp()
            torch.nn.init.constant_(model[3].weight, 0.1)
            with (
                torch.autocast("cpu", dtype=torch.bfloat16),
                fastlur.MetaStep(model, lr=0.0, gradient=gradient, inner_lr=inner_lr, precision="bf16") as step,
            ):
                step((x, y), (x, y))
                found[gradient] = [view.clone() for view in step.state.outer_gradient.views]
                at_theta = [view.clone() for view in step.state.inner_gradient.views]
        cosine = torch.nn.functional.cosine_similarity(
            torch.cat([v.flatten() for v in found["first_order"]]), torch.cat([-v.flatten() for v in at_theta]), dim=0
        )
        assert float(cosine) < 0.999

    def test_a_swap_under_a_live_graph_would_be_wrong_and_exact_avoids_it(self):
        """Autograd does not notice the swap: this is the trap. `exact` must come out right all the same."""
        model = Point(torch.tensor([1.5], dtype=torch.float64))
        space = ParameterSpace(model)
        (gradient,) = torch.autograd.grad((model() ** 3).sum(), model.x, create_graph=True)
        away = space.vector()
        away.flats[0].fill_(10.0)
        with space.at(away):
            (second,) = torch.autograd.grad(gradient.sum(), model.x)
        assert float(second) != pytest.approx(6 * 1.5)
        space.close()
        with fastlur.MetaStep(
            model, lambda m, _: (m() ** 3).sum(), lambda m, _: m().sum(), lr=0.0, gradient="exact", inner_lr=0.1
        ) as step:
            step(None, None)
            assert float(step.state.inner_gradient.views[0]) == pytest.approx(3 * 1.5**2 - 0.1 * 6 * 1.5)


class TestStatistics:
    @pytest.mark.parametrize("gradient", MODES)
    @pytest.mark.parametrize("order", ORDERS)
    def test_batch_norm_moves_in_exactly_one_retain_pass(self, gradient, order):
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
        forget, retain = blobs(16), blobs(16)
        twin = copy.deepcopy(model)
        with fastlur.MetaStep(model, gradient=gradient, order=order, inner_lr=0.5) as step:
            for _ in range(3):
                step(forget, retain)
                twin.train()
                twin[0](retain[0])  # the statistics of the input do not depend on the weights
        assert int(model[0].num_batches_tracked) == 3
        torch.testing.assert_close(model[0].running_mean, twin[0].running_mean, rtol=0, atol=0)
        torch.testing.assert_close(model[0].running_var, twin[0].running_var, rtol=0, atol=0)

    @pytest.mark.parametrize("gradient", ["exact", "secant", "first_order"])
    def test_the_pass_at_theta_is_the_one(self, gradient):
        """Behind a layer that moves, statistics tell where they were taken: at θ for these modes."""
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        twin = copy.deepcopy(model)
        forget, retain = blobs(16), blobs(16)
        with fastlur.MetaStep(model, gradient=gradient, inner_lr=5.0) as step:
            step(forget, retain)
        twin.train()(retain[0])
        torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)

    def test_optimistic_takes_them_at_its_only_retain_pass(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        forget, retain = blobs(16), blobs(16)
        with fastlur.MetaStep(model, lr=0.0, gradient="optimistic", inner_lr=5.0) as step:
            step(forget, retain)
            before = model[1].running_mean.clone()
            twin = copy.deepcopy(model)
            step(forget, retain)
            with step.space.at(step.state.point):
                weight = model[0].weight.detach().clone()
                bias = model[0].bias.detach().clone()
        with torch.no_grad():
            twin[0].weight.copy_(weight)
            twin[0].bias.copy_(bias)
        twin.train()(retain[0])
        assert not torch.equal(before, model[1].running_mean)
        torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)

    def test_other_buffers_move_once_too(self):
        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(6, 4)
                self.register_buffer("calls", torch.zeros(()))
                self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

            def forward(self, x):
                self.calls += 1
                return self.norm(self.linear(x).unsqueeze(1)).squeeze(1)

        model = Counts()
        with fastlur.MetaStep(model, gradient="secant") as step:
            for _ in range(4):
                step(blobs(8), blobs(8))
        assert float(model.calls) == 4

    def test_the_trial_before_the_run_moves_nothing(self, cnn):
        start = state(cnn)
        with pytest.raises(Interrupted):
            fastlur.unlearn(
                cnn, images(4), images(8), progress=False, optimizer=_Refuses(cnn.parameters()), batch_size=4
            )
        assert same(start, state(cnn))


class TestBuffersThatComeAndGo:
    class Odd(nn.Module):
        """One buffer appears in the first forward, one grows, one is registered on the way."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.register_buffer("late", None)
            self.register_buffer("log", torch.zeros(0))

        def forward(self, x):
            self.late = x.detach().mean(0)
            self.log = torch.cat((self.log, torch.ones(1)))
            if not hasattr(self, "extra"):
                self.register_buffer("extra", torch.zeros(()))
            self.extra += 1
            return self.linear(x)

    @pytest.mark.parametrize("gradient", ["secant", "first_order", "optimistic"])
    def test_they_move_in_one_retain_pass_a_step(self, gradient):
        model = self.Odd()
        retain = blobs(8)
        with fastlur.MetaStep(model, gradient=gradient) as step:
            for _ in range(3):
                step(blobs(8), retain)
        assert torch.equal(model.late, retain[0].mean(0))
        assert len(model.log) == 3
        assert float(model.extra) == 3

    def test_a_bad_step_leaves_them(self):
        model = self.Odd()
        with fastlur.MetaStep(model) as step:
            step(blobs(8), blobs(8))
            before = model.late.clone(), model.log.clone()
            x, y = blobs(8)
            with pytest.raises(fastlur.NonFiniteError):
                step(blobs(8), (x * float("inf"), y))
        assert torch.equal(model.late, before[0])
        assert torch.equal(model.log, before[1])


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
        with pytest.raises(fastlur.NonFiniteError, match="the update itself overflowed"):
            run(model, (x[:8].half(), y[:8]), (x[8:].half(), y[8:]), steps=1, lr=1e6)

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


class _Refuses(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)

    def step(self, closure=None):
        raise Interrupted


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


class TestNonFinite:
    @pytest.mark.parametrize("side", ["forget_loss", "loss"])
    @pytest.mark.parametrize("gradient", MODES)
    def test_the_model_is_as_at_the_last_good_step(self, cnn, gradient, side):
        good = []

        def fails(model, batch):
            value = fastlur.losses.cross_entropy(model, batch)
            return value * float("nan") if len(good) == 2 else value

        def remember(event):
            good.append(state(event.model))

        data = images(12), images(20)
        with pytest.raises(fastlur.NonFiniteError, match="step 3"):
            run(
                cnn,
                *data,
                steps=6,
                method=fastlur.LUR(gradient=gradient),
                callbacks=[remember],
                **{side: fails},
            )
        assert len(good) == 2
        assert same(state(cnn), good[-1])

    def test_nothing_moves_after_a_bad_step_even_unread(self, cnn, monkeypatch):
        """On a GPU the host looks only every 32 steps; the steps between must write nothing."""
        step = fastlur.MetaStep(cnn, loss=lambda m, b: fastlur.losses.cross_entropy(m, b[0]) * b[1], momentum=0.9)
        monkeypatch.setattr(step, "check", lambda: None)
        forget, retain = images(8), images(8)
        step(forget, (retain, 1.0))
        good = state(cnn)
        moment = step.update.first.flats[0].clone()
        step(forget, (retain, float("inf")))
        step(forget, (retain, 1.0))
        assert same(state(cnn), good)
        assert torch.equal(step.update.first.flats[0], moment)
        assert float(step.update.control[1]) == 1
        monkeypatch.undo()
        with pytest.raises(fastlur.NonFiniteError, match="step 2"):
            step.check()
        step.close()
