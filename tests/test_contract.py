"""The model leaves as it came, whatever happens in between: its parameters and their storage."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
import torch.utils.checkpoint
from helpers import MODES, Attention, Interrupted, Point, blobs, images, interrupt, mlp, run, same, state
from torch import nn

import fastlur
from fastlur.demo import residual_cnn
from fastlur.space import ParameterSpace


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
