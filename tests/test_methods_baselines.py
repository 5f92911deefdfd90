"""The baselines move along the gradient that their rule says, told by an independent few-line oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Interrupted, blobs, interrupt, mlp, run, same, state
from torch import Tensor, nn
from torch.nn import functional

import fastlur
from fastlur import methods

F64 = torch.float64
LR = 0.1


@pytest.fixture
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return blobs(8, dtype=F64), blobs(8, dtype=F64)


def moved(method, model: nn.Module, forget, retain, steps: int = 1, **options) -> Tensor:
    """How far plain gradient descent went, over the learning rate: the sum of the directions."""
    before = flat(model.parameters())
    options = {"lr": LR, "momentum": 0.0, "schedule": "constant", "batch_size": 8, "progress": False} | options
    fastlur.unlearn(model, forget, retain, method=method, steps=steps, **options)
    return (before - flat(model.parameters())) / LR


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return flat(torch.autograd.grad(value, list(model.parameters())))


def entropy(model: nn.Module, data) -> Tensor:
    return functional.cross_entropy(model(data[0]), data[1])


def rules(model, forget, retain) -> dict[str, tuple[object, Tensor]]:
    """For every method: an instance, and the direction of its first step."""
    r, f = gradient(model, entropy(model, retain)), -gradient(model, entropy(model, forget))
    theta = flat(model.parameters())
    weak = 0.5 * f
    conflict = r @ weak < 0
    purged_r = r - (r @ weak) / (weak @ weak) * weak if conflict else r
    purged_f = weak - (r @ weak) / (r @ r) * r if conflict else weak
    confidence = 0.25 + torch.softmax(model(forget[0]), -1)[torch.arange(8), forget[1]].mean()
    return {
        "fine_tune": (methods.FineTune(), r),
        "retrain": (methods.Retrain(), r),
        "l1_sparse": (methods.L1Sparse(gamma=0.3), r + 0.3 * theta.sign()),
        "gradient_ascent": (methods.GradientAscent(bounded=False), f),
        "neggrad_plus": (methods.NegGradPlus(retain_weight=0.7), 0.7 * r + 0.3 * f),
        "pcgrad": (methods.PCGrad(forget_weight=0.5), purged_r + purged_f),
        "gru": (methods.GRU(forget_weight=0.5, retain_weight=2.0), 2 * r + purged_f),
        "gru alone": (methods.GRU(forget_weight=0.5, retain_weight=0.0), purged_f),
        "eupmu": (methods.EUPMU(), gradient(model, confidence.log())),
    }


NAMES = ("fine_tune", "retrain", "l1_sparse", "gradient_ascent", "neggrad_plus", "pcgrad", "gru", "gru alone", "eupmu")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conflict", [True, False])
def test_the_first_step_is_the_rule(name, conflict, data):
    model, (forget, retain) = mlp(dtype=F64), data
    if conflict:  # the very items to forget are among those to keep
        retain = torch.cat([retain[0][:2], forget[0][:6]]), torch.cat([retain[1][:2], forget[1][:6]])
    else:  # whatever helps to keep these helps to forget the others
        retain = forget[0], (forget[1] + 1) % 4
    method, wanted = rules(model, forget, retain)[name]
    dots = gradient(model, entropy(model, retain)) @ gradient(model, entropy(model, forget))
    assert (dots > 0) == conflict
    torch.testing.assert_close(moved(method, model, forget, retain, allow_overlap=True), wanted)


class TestSchedules:
    def test_the_l1_penalty_fades_to_nothing(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        twin = copy.deepcopy(model)
        moved(methods.L1Sparse(gamma=0.4), model, forget, retain, steps=4)
        for part in (1, 0.75, 0.5, 0.25):
            step = [g + 0.4 * part * p.sign() for p, g in zip(twin.parameters(), grads(twin, retain), strict=True)]
            with torch.no_grad():
                for p, g in zip(twin.parameters(), step, strict=True):
                    p -= LR * g
        torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))

    def test_gru_projects_on_the_average_of_what_it_saw(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        twin = copy.deepcopy(model)
        moved(methods.GRU(forget_weight=2.0, decay=0.8, retain_weight=0.5), model, forget, retain, steps=3)
        average = 0.0
        for _ in range(3):
            r = gradient(twin, entropy(twin, retain))
            f = -2 * gradient(twin, entropy(twin, forget))
            average = 0.8 * average + 0.2 * r
            f = f - min(float(f @ average), 0) / (average @ average) * average
            descend(twin, 0.5 * r + f)
        torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))

    @pytest.mark.parametrize("fall", [0.01, -0.5])
    def test_the_weight_of_eupmu_follows_the_retain_loss(self, data, fall):
        model, (forget, retain) = mlp(dtype=F64), data
        twin, last = copy.deepcopy(model), copy.deepcopy(model)
        w = torch.zeros((), dtype=F64, requires_grad=True)
        adam = torch.optim.Adam([w], lr=0.3, weight_decay=0.05)
        weights = []
        for _ in range(6):
            change = entropy(last, retain).log() - entropy(twin, retain).log() - fall
            w.grad = change.detach()
            adam.step()
            weights.append(w.item())
            last.load_state_dict(twin.state_dict())
            confidence = 0.25 + torch.softmax(twin(forget[0]), -1)[torch.arange(8), forget[1]].mean()
            loss = confidence.log() + max(w.item(), 0.0) * entropy(twin, retain).log()
            descend(twin, gradient(twin, loss))
        method = methods.EUPMU(weight_lr=0.3, decay=0.05, required_fall=fall)
        seen = []
        moved(method, model, forget, retain, steps=6, callbacks=[lambda event: seen.append(event.stats)])
        torch.testing.assert_close(flat(model.parameters()), flat(twin.parameters()))
        assert max(weights) > 0 if fall > 0 else min(weights) < 0
        assert float(seen[-1].retain_loss) > 0  # the losses, not their logarithms
        assert float(seen[-1].forget_loss) > 0.25


def grads(model, data):
    return torch.autograd.grad(entropy(model, data), list(model.parameters()))


def descend(model: nn.Module, direction: Tensor) -> None:
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(flat(model.parameters()) - LR * direction, model.parameters())


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: methods.L1Sparse(gamma=-1), "gamma=-1"),
            (lambda: methods.NegGradPlus(retain_weight=1.5), "retain_weight=1.5"),
            (lambda: methods.PCGrad(forget_weight=float("nan")), "forget_weight=nan"),
            (lambda: methods.GRU(decay=1), "decay=1"),
            (lambda: methods.EUPMU(weight_lr=-0.1), "weight_lr=-0.1"),
            (lambda: methods.GradientAscent(bounded=3), "bounded=3"),
            (lambda: methods.Retrain(reinitialise="yes"), "reinitialise='yes'"),
        ],
    )
    def test_arguments_out_of_range(self, make, said):
        with pytest.raises(fastlur.ArgumentError, match=said):
            make()

    @pytest.mark.parametrize("name", ["fine_tune", "retrain", "l1_sparse"])
    def test_a_forget_loss_that_would_not_be_used(self, name, data):
        with pytest.raises(fastlur.ArgumentError, match="forget_loss"):
            moved(name, mlp(dtype=F64), *data, forget_loss=fastlur.losses.negative_cross_entropy)

    def test_a_loss_without_a_logarithm(self, data):
        with pytest.raises(fastlur.ArgumentError, match="needs a positive loss"):
            moved("eupmu", mlp(dtype=F64), *data, forget_loss=fastlur.losses.negative_cross_entropy)

    def test_a_retain_loss_without_a_logarithm_is_told_what_a_retain_loss_is(self, data):
        with pytest.raises(fastlur.ArgumentError, match=r"^loss: .*first retain batch.*cross_entropy"):
            moved("eupmu", mlp(dtype=F64), *data, loss=fastlur.losses.negative_cross_entropy)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_eupmu_bears_a_model_so_sure_that_the_retain_loss_is_nothing(dtype):
    model, (x, _) = mlp(dtype=dtype), blobs(40, dtype=dtype)
    with torch.no_grad():
        model[3].weight.mul_(1e4)
        y, sure = (
            model(x).argmax(-1),
            model(x).topk(2).values.diff(dim=-1)[:, 0].abs() > 800,
        )  # so that nothing rounds the loss up from 0
    x, y = x[sure], y[sure]
    assert len(y) > 20 and fastlur.losses.cross_entropy(model, (x[8:], y[8:])).detach() == 0
    fastlur.unlearn(model, (x[:8], y[:8]), (x[8:], y[8:]), method="eupmu", steps=5, lr=1.0, progress=False)
    assert all(bool(v.isfinite().all()) for v in state(model).values())
    assert fastlur.methods.eupmu.logarithm(torch.tensor(-1.0)).isnan()


class TestRetrain:
    def trained(self, forget) -> nn.Module:
        model = mlp(dtype=F64)
        fastlur.unlearn(model, blobs(8, dtype=F64), forget, method="fine_tune", steps=200, lr=0.3, progress=False)
        return model

    def test_a_model_that_knows_the_forget_data_is_no_fresh_one(self, data):
        model = self.trained(data[0])
        before = state(model)
        with pytest.raises(fastlur.ModelError, match="fine-tuning"):
            moved("retrain", model, *data)
        assert same(before, state(model))

    def test_a_model_made_fresh_owes_nothing_to_what_it_was(self, data):
        method = methods.Retrain(reinitialise=True)
        first, second = self.trained(data[0]), mlp(dtype=F64)
        moved(method, first, *data, steps=3)
        moved(method, second, *data, steps=3)
        assert same(state(first), state(second))

    def test_a_parameter_that_nothing_draws_anew(self, data):
        model = mlp(dtype=F64)
        model.extra = nn.Parameter(torch.zeros(3, dtype=F64))
        with pytest.raises(fastlur.ModelError, match="'extra'"):
            moved(methods.Retrain(reinitialise=True), model, *data)

    @pytest.mark.parametrize("part", [{"trim": methods.Trim()}, {"mask": methods.SaliencyMask()}])
    def test_new_weights_leave_nothing_for_a_trim_or_a_mask_to_hold(self, part, data):
        with pytest.raises(fastlur.ArgumentError, match=f"{next(iter(part))}=.*reinitialise=True"):
            methods.Retrain(reinitialise=True, **part)
        moved(methods.Retrain(**part), mlp(dtype=F64), *data)

    def test_weights_that_do_not_move_stay(self, data):
        model = mlp(dtype=F64)
        before = state(model)
        moved(methods.Retrain(reinitialise=True), model, *data, parameters="3.weight")
        assert [n for n, v in state(model).items() if not torch.equal(v, before[n])] == ["3.weight"]


def test_data_of_any_kind_can_be_trained_on_without_a_forget_pass():
    model, x = nn.Linear(6, 1), torch.randn(16, 6)
    loss = lambda m, batch: (m(batch[0]) - batch[1]).square().mean()
    fastlur.unlearn(model, (x, torch.ones(16, 1)), (x + 1, x.sum(1, True)), method="fine_tune", loss=loss, steps=2)


class TestBrakes:
    def test_a_long_gradient_is_cut_and_a_short_one_is_not(self, data):
        model, (forget, retain) = mlp(dtype=F64), data
        climb = -gradient(model, entropy(model, forget))
        options = {"steps": 1, "forget_loss": fastlur.losses.negative_cross_entropy}
        for longest, wanted in ((0.01, 0.01 * climb / climb.norm()), (100.0, climb)):
            method = methods.GradientAscent(max_norm=longest)
            torch.testing.assert_close(moved(method, copy.deepcopy(model), forget, retain, **options), wanted)

    def test_the_climb_ends_for_good_when_the_retain_loss_has_risen(self, data):
        model, (forget, _) = mlp(dtype=F64), data
        options = {
            "steps": 30,
            "momentum": 0.9,
            "forget_loss": fastlur.losses.negative_cross_entropy,
            "allow_overlap": True,
        }
        went = {}
        for rise in (0.1, 1e6):
            method, twin = methods.GradientAscent(max_norm=10.0, max_rise=rise), copy.deepcopy(model)
            losses = []
            moved(
                method,
                twin,
                forget,
                (forget[0], forget[1]),
                callbacks=[lambda e, out=losses: out.append(e.stats)],
                **options,
            )
            went[rise] = [round(float(stats.retain_loss), 9) for stats in losses]  # batches come in any order
        ended = next(number for number, loss in enumerate(went[0.1]) if loss > went[0.1][0] + 0.1)
        assert went[0.1][: ended + 1] == went[1e6][: ended + 1]
        assert len(set(went[0.1][ended:])) == 1  # momentum does not go on either
        assert went[1e6][-1] > went[0.1][-1]

    def test_losses_are_those_of_the_finished_model(self, cnn):
        seen = []

        def climbing(model, batch):
            seen.append(any(module.training for module in model.modules()))
            return fastlur.losses.negative_cross_entropy(model, batch)

        before = state(cnn)
        run(cnn, method="gradient_ascent", forget_loss=climbing)
        assert seen[1:] == [False] * 3  # after the trial
        assert all(torch.equal(value, before[name]) for name, value in state(cnn).items() if "running" in name)


def test_ascent_ends_at_the_loss_of_guessing(data):
    forget = data[0][0], torch.ones(8, dtype=torch.long)
    for rival, ends in ((0.5, True), (-0.5, False)):  # losses of 1.54 and 1.28; guessing costs 1.39
        model = mlp(dtype=F64)
        with torch.no_grad():
            model[3].weight.zero_()
            model[3].bias[:] = torch.tensor([rival, 0, 0, 0])
        assert (float(moved("gradient_ascent", model, forget, data[1]).abs().max()) == 0) == ends


def test_a_loss_that_blows_up_is_named_although_the_other_side_has_none(data):
    calls = []

    def breaks(model, batch):
        calls.append(1)
        return fastlur.losses.cross_entropy(model, batch) * (float("inf") if len(calls) > 2 else 1)

    with pytest.raises(fastlur.NonFiniteError, match="step 2: retain_loss"):
        moved("fine_tune", mlp(dtype=F64), *data, steps=4, loss=breaks)


@pytest.mark.parametrize("name", ["gru", "eupmu", "pcgrad"])
def test_an_interrupted_run_goes_on_bit_for_bit(name, data, tmp_path):
    model = mlp(dropout=0.3, dtype=F64)
    whole, part, again = (copy.deepcopy(model) for _ in range(3))
    options = {"steps": 5, "batch_size": 3, "momentum": 0.9}
    moved(name, whole, *data, **options)
    options |= {"checkpoint": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Interrupted):
        moved(name, part, *data, **options, callbacks=[lambda event: interrupt(event) if event.step == 2 else None])
    with pytest.raises(Interrupted):
        moved(name, copy.deepcopy(model), *data, **options, callbacks=[stop_at(4)])
    moved(name, again, *data, **options)
    assert same(state(whole), state(again))


def stop_at(step: int):
    def callback(event):
        if event.step == step + 1:
            raise Interrupted

    return callback
