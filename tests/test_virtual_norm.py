"""Batch norm by the statistics of retain items: the formula, what it leaves alone, and what it is for."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import MODES, blobs, direction, same, state
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import fastlur
from fastlur import demo
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.passes import Passes
from fastlur.space import ParameterSpace
from fastlur.statistics import Statistics
from fastlur.targets import Imitation, Novice
from fastlur.virtual_norm import LEAST, REFERENCE, VirtualNorm

ALPHA, WEIGHT = 0.05, 0.7


def normed(dtype: torch.dtype = torch.float64, affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, affine=affine),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 16, 6),
        nn.BatchNorm1d(6, affine=affine),
        nn.Linear(6, 4),
    ).to(dtype)


def pictures(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x + seed, torch.randint(4, (n,), generator=generator)


def by_hand(model: nn.Sequential, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Both in one batch, of which the reference alone is averaged over."""
    n, both = len(x), torch.cat((x, reference))
    for layer in model:
        if not isinstance(layer, _BatchNorm):
            both = layer(both)
            continue
        shape = [1, -1] + [1] * (both.dim() - 2)
        variance, mean = torch.var_mean(both[n:], [0, *range(2, both.dim())], correction=0)
        both = (both - mean.view(shape)) / torch.sqrt(variance.view(shape) + layer.eps)
        if layer.weight is not None:
            both = both * layer.weight.view(shape) + layer.bias.view(shape)
    return both[:n]


@pytest.mark.parametrize("affine", [True, False])
def test_the_formula_and_its_gradient(affine):
    model = normed(affine=affine).train()
    (x, y), (reference, _) = pictures(5, 1), pictures(7, 2)
    with Statistics(model).frozen(), VirtualNorm(model).by(lambda: model(reference)):
        found = model(x)
    wanted = by_hand(model, x, reference)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, model(x), atol=0.1)  # by its own it is something else
    loss = nn.functional.cross_entropy
    pairs = [torch.autograd.grad(loss(each, y), list(model.parameters())) for each in (found, wanted)]
    for one, other in zip(*pairs, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind():
    model = normed().train()
    model[1].forward = forward = model[1].forward  # somebody's own, on the instance
    before = state(model)
    for fails in (False, True):
        try:
            with Statistics(model).frozen(), VirtualNorm(model).by(lambda: model(pictures(7, 2)[0])):
                model(pictures(5, 1)[0])
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert model[1].forward is forward
        assert "forward" not in vars(model[5])
        assert same(state(model), before)


def test_a_layer_that_does_more_than_to_normalise_still_does_it():
    class Clipped(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).clamp(min=0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Clipped(3)).double().train()
    x, reference = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64) + 1
    plain = nn.Sequential(model[0], nn.BatchNorm1d(3).double())
    with Statistics(model).frozen(), VirtualNorm(model).by(lambda: model(reference)):
        found = model(x)
    assert torch.allclose(found, by_hand(plain, x, reference).clamp(min=0))
    assert not found.min().is_nonzero() and bool(by_hand(plain, x, reference).min() < 0)


def test_a_layer_called_twice_has_the_statistics_of_each_call():
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3).double().train()

    class Twofold(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x).exp())

    model = Twofold()
    x, reference = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    with Statistics(model).frozen(), VirtualNorm(model).by(lambda: model(reference)):
        found = model(x)

    def scaled(x, by):
        return (x - by.mean(0)) / torch.sqrt(by.var(0, correction=0) + layer.eps)

    first, of_reference = scaled(x, reference).exp(), scaled(reference, reference).exp()
    assert torch.allclose(found, scaled(first, of_reference))


def objective(model, order):
    """The meta-gradient by autograd through a step by hand, in float64."""
    parameters = dict(model.named_parameters())
    (fx, fy), (rx, ry) = pictures(8, 1), pictures(64, 2)
    loss = nn.functional.cross_entropy

    def losses(values):
        def call(function):
            with torch.nn.utils.stateless._reparametrize_module(model, values):
                return function()

        return {
            "retain": lambda: call(lambda: loss(model(rx), ry)),
            "forget": lambda: -WEIGHT * call(lambda: loss(by_hand(model, fx, rx[::4]), fy)),
        }

    first, second = ("retain", "forget") if order == "retain_first" else ("forget", "retain")
    inner = torch.autograd.grad(losses(parameters)[first](), list(parameters.values()), create_graph=True)
    moved = {name: p - ALPHA * g for (name, p), g in zip(parameters.items(), inner, strict=True)}
    total = losses(parameters)[first]() + losses(moved)[second]()
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


@pytest.mark.parametrize("order", ["retain_first", "forget_first"])
@pytest.mark.parametrize("hessian", ["autograd", "func"])
def test_the_exact_direction_is_that_of_the_objective(order, hessian):
    model = normed().train()
    wanted = objective(copy.deepcopy(model), order)
    with fastlur.MetaStep(
        model,
        forget_loss=negative_cross_entropy,
        gradient="exact",
        order=order,
        inner_lr=ALPHA,
        forget_weight=WEIGHT,
        hessian=hessian,
        lr=0.0,
    ) as step:
        step(pictures(8, 1), pictures(64, 2))
        found = direction(step)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-7, atol=1e-10), name


def test_one_backward_of_both_losses_is_what_two_are():
    model, losses = normed(), {"forget": negative_cross_entropy, "retain": cross_entropy}
    found = {}
    for by in ("own", "retain"):
        passes = Passes(ParameterSpace(model), losses, {"forget": WEIGHT, "retain": 1.0}, normalize_by=by)
        together, apart = passes.space.vector(), passes.space.vector()
        with passes.of_step(1, pictures(8, 1), pictures(64, 2)):
            passes.joint(together)
            passes.gradient("retain", apart)
            passes.gradient("forget", apart, add=True)
        for one, other in zip(together.flats, apart.flats, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        found[by] = together.flats[0].clone()
        passes.space.close()
    assert not torch.allclose(found["own"], found["retain"], rtol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_without_batch_norm_it_is_nothing(mode):
    weights = []
    for by in ("own", "retain"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Linear(8, 4))
        with fastlur.MetaStep(model, gradient=mode, normalize_by=by) as step:
            for _ in range(3):
                step(pictures(8, 1, torch.float32), pictures(8, 2, torch.float32))
        weights.append(state(model))
    assert same(*weights)


@pytest.mark.parametrize("rows", [3, 16, 20, 128])
def test_a_quarter_of_the_retain_items_is_the_reference(rows):
    model, seen = normed().train(), []

    def spy(model, batch):
        seen.append(len(batch[1]))
        return cross_entropy(model, batch)

    with fastlur.MetaStep(model, loss=spy, lr=0.0, gradient="first_order", forget_weight=1.0) as step:
        step(pictures(8, 1), pictures(rows, 2))
    assert seen == [rows, max(-(-rows // REFERENCE), min(rows, LEAST))]


def test_statistics_move_in_the_retain_pass_alone():
    model = normed(torch.float32)
    other = copy.deepcopy(model).train()
    with fastlur.MetaStep(model, lr=0.0) as step:
        step(pictures(8, 1, torch.float32), pictures(64, 2, torch.float32))
    other(pictures(64, 2, torch.float32)[0])
    assert all(torch.allclose(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_of_a_model_that_checkpoints_it_is_said_that_it_cannot_be():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = normed(torch.float32)

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    weights = []
    for by in ("own", "retain"):
        model = Checkpointed()
        with warnings.catch_warnings(record=True) as said, fastlur.MetaStep(model, normalize_by=by, lr=0.1) as step:
            warnings.simplefilter("always")
            for _ in range(2):
                step(pictures(8, 1, torch.float32), pictures(64, 2, torch.float32))
        assert [("normalize_by='retain' cannot be had" in str(each.message)) for each in said] == [True] * (by != "own")
        weights.append(state(model))
    assert same(*weights)


def test_a_compiled_form_is_not_asked_where_statistics_are_lent(monkeypatch):
    calls = []

    def compiled(model):
        def forward(*inputs):
            calls.append(len(inputs[0]))
            return model(*inputs)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    weights = []
    for asked in (True, False):
        model = normed(torch.float32)
        with fastlur.MetaStep(model, compile=asked, lr=0.1) as step:
            step(pictures(8, 1, torch.float32), pictures(64, 2, torch.float32))
        weights.append(state(model))
    assert same(*weights)
    assert calls == [64] * len(calls) and calls


def test_an_unknown_source_of_statistics_is_refused_and_nothing_has_changed():
    model = normed(torch.float32)
    before = state(model)
    for by in ("forget", None, 1, torch.ones(2).numpy()):
        with pytest.raises(fastlur.ArgumentError, match="normalize_by="):
            fastlur.MetaStep(model, normalize_by=by)
        method = fastlur.methods.METHODS["pcgrad"](normalize_by=by)
        assert method.cost.passes == 2
        data = pictures(8, 1, torch.float32), pictures(64, 2, torch.float32)
        with pytest.raises(fastlur.ArgumentError, match="normalize_by="):
            fastlur.unlearn(model, *data, method=method, progress=False)
    assert same(state(model), before)


def test_passes_in_eval_mode_take_running_statistics():
    model = normed()
    losses = {"forget": negative_cross_entropy, "retain": cross_entropy}
    found = []
    for by in ("own", "retain"):
        passes = Passes(ParameterSpace(model), losses, {"forget": 1.0, "retain": 1.0}, normalize_by=by)
        with passes.aside({"forget": pictures(8, 1), "retain": pictures(64, 2)}):
            found.append(float(passes.value("forget")))
        passes.space.close()
    assert found[0] == found[1] == float(negative_cross_entropy(model.eval(), pictures(8, 1)).detach())


def test_what_is_learned_on_one_class_holds_in_use():
    """Half of a class is to be answered as a novice does: in training both do so, in use those who borrow do."""
    images, labels = demo.scenario("class", 0).retain
    given = demo.train((images, labels), demo.EPOCHS, 1)
    alike = (labels == labels[0]).nonzero().flatten()
    gone = torch.zeros(len(labels), dtype=torch.bool)
    gone[alike[: len(alike) // 2]] = True
    forget, retain = ((images[mask], labels[mask]) for mask in (gone, ~gone))
    wanted = Imitation(Novice(epochs=6).teacher(given, retain), 2.0)
    missed = {}
    for by in ("own", "retain"):
        model = copy.deepcopy(given)
        method = fastlur.LUR(normalize_by=by, forget_weight=0.3)
        fastlur.unlearn(model, forget, retain, method=method, forget_loss=wanted, steps=80, progress=False)
        missed[by] = float(wanted(model.eval(), forget).detach())
    assert missed["retain"] < missed["own"] / 3


def test_a_loss_that_takes_whole_batches_only_has_the_whole_batch_for_a_reference():
    model, seen = normed().train(), []

    def whole(model, batch):
        seen.append(len(batch[1]))
        if len(batch[1]) != 64:
            raise RuntimeError("a batch of 64 it must be")
        return cross_entropy(model, batch)

    with fastlur.MetaStep(model, loss=whole, lr=0.0, gradient="first_order") as step:
        step(pictures(8, 1), pictures(64, 2))
    assert seen == [64, 16, 64]


def test_a_novice_that_meets_what_it_cannot_take_is_done_without():
    """An epoch's last batch has one item, which batch norm refuses; the run itself never comes to it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    retain = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*blobs(97)), batch_size=16)
    result = fastlur.unlearn(model, blobs(32, 6), retain, steps=4, progress=False, allow_overlap=True)
    assert "BoundedForgetting" in result.settings["forget_target"]
