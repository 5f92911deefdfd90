"""The model leaves as it came: buffers and statistics, and what a bad step must not write."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.utils.checkpoint
from helpers import MODES, ORDERS, Growing, Interrupted, blobs, images, run, same, state
from torch import nn

import fastlur
from fastlur import space
from fastlur.statistics import put_back


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
    @pytest.mark.parametrize("gradient", ["secant", "first_order", "optimistic"])
    def test_they_move_in_one_retain_pass_a_step(self, gradient):
        model = Growing(nn.Linear(6, 4))
        retain = blobs(8)
        with fastlur.MetaStep(model, gradient=gradient) as step:
            for _ in range(3):
                step(blobs(8), retain)
        assert torch.equal(model.late, retain[0].mean(0))
        assert len(model.log) == 3
        assert float(model.extra) == 3

    def test_a_bad_step_leaves_them(self):
        model = Growing(nn.Linear(6, 4))
        with fastlur.MetaStep(model) as step:
            step(blobs(8), blobs(8))
            before = model.late.clone(), model.log.clone()
            x, y = blobs(8)
            with pytest.raises(fastlur.NonFiniteError):
                step(blobs(8), (x * float("inf"), y))
        assert torch.equal(model.late, before[0])
        assert torch.equal(model.log, before[1])


class _Refuses(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)

    def step(self, closure=None):
        raise Interrupted


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("ok", [0.0, 1.0])
def test_buffers_are_put_back_by_their_bits_or_not_at_all(dtype, ok):
    """As where nobody may wait for the flag: on the device, for what is not finite too."""
    odd = [-math.inf, math.nan, 0.0, -0.0, 1.0, 3e38] if dtype.is_floating_point else [0, 1, 255, 7, 1, 0]
    before = torch.tensor(odd, dtype=torch.float64).to(dtype)
    now = before.flip(0).clone()
    wanted = (now if ok else before).clone()
    given = before.clone()
    put_back([now, torch.zeros(2)], [before, torch.zeros(2)], torch.tensor(ok, dtype=torch.float64))
    bits = torch.uint8
    assert torch.equal(now.view(bits), wanted.view(bits))
    assert torch.equal(before.view(bits), given.view(bits))


class Twofold(nn.Module):
    """Large tensors: one used by both losses, one by the retain loss alone, one tied under two names, one by none."""

    def __init__(self):
        super().__init__()
        self.shared, self.kept = nn.Linear(6, 4), nn.Linear(6, 4)
        self.idle = nn.Parameter(torch.ones(200_000))
        self.wide, self.tied = nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False)
        self.tied.weight = nn.Parameter(self.wide.weight.data)  # another object over the same memory

    def forward(self, x):
        y = x[:, :1].expand(-1, 300)
        deep = self.tied(torch.tanh(self.wide(y)))[:, :4]
        return self.shared(x) + 0.1 * deep + (self.kept(x) if self.keeping else 0.0)


@pytest.mark.parametrize("gradient", MODES)
def test_gradients_left_where_autograd_puts_them_are_the_same(gradient, monkeypatch):
    """Few large tensors are taken as they come; copied into flat storage they must be the same ones."""

    def keep(model, batch):
        model.keeping = True
        return fastlur.losses.cross_entropy(model, batch)

    def go(model, batch):
        model.keeping = False
        return fastlur.losses.negative_cross_entropy(model, batch)

    torch.manual_seed(5)
    model, forget, retain = Twofold(), blobs(8), blobs(8)
    found = []
    for large in (0, 1 << 40):
        monkeypatch.setattr(space, "LARGE", large)
        copied = copy.deepcopy(model)
        copied.tied.weight = nn.Parameter(copied.wide.weight.data)
        with fastlur.MetaStep(copied, keep, go, gradient=gradient, max_grad_norm=1.0, weight_decay=0.1) as step:
            assert step.space.piecewise == (large == 0)
            for _ in range(3):
                step(forget, retain)
            assert step.state.outer_gradient.gathered == (large > 0)
            assert not step.state.outer_gradient.views[step.space.names.index("idle")].any()
            assert not step.state.outer_gradient.views[step.space.names.index("kept.weight")].any()
        assert torch.equal(copied.idle, model.idle)  # weight decay or not
        found.append(state(copied))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-6, atol=1e-7)


def test_a_vector_asked_for_its_flat_form_holds_the_same():
    model = nn.Linear(400, 300)
    with fastlur.MetaStep(model) as step:
        batch = torch.randn(4, 400), torch.randint(0, 300, (4,))
        step(batch, batch)
        vector = step.state.outer_gradient
        loose = [view.clone() for view in vector.views]
        assert not vector.gathered
        assert float(vector.flats[0].norm()) == pytest.approx(float(torch.cat([x.reshape(-1) for x in loose]).norm()))
        assert vector.gathered
        assert vector.loose is None
        assert all(torch.equal(x, y) for x, y in zip(loose, vector.views, strict=True))
        step(batch, batch)  # and it stays flat
        assert vector.gathered
        assert vector.loose is None
        vector.zero_()
        assert not any(view.any() for view in vector.views)
