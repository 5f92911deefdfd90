"""The parts that any method can switch on: a trim before the first step and a mask of what may move."""

from __future__ import annotations

import copy
import functools
import json
import math

import pytest
import torch
from helpers import Interrupted, blobs, interrupt, mlp, run, same, state
from torch import nn
from torch.nn import functional

import fastlur
from fastlur.data import Feed, source
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.methods import SaliencyMask, Trim
from fastlur.passes import Passes
from fastlur.space import ParameterSpace
from fastlur.world import borrowed_random

CPU = torch.device("cpu")


def normed() -> nn.Module:
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)]
    nn.init.uniform_(layers[1].bias)
    nn.init.uniform_(layers[1].running_mean)
    return nn.Sequential(*layers).double()


def opened(model, forget, batch_size=8):
    space = ParameterSpace(model)
    feed = Feed({"forget": source(forget, "forget", batch_size), "retain": None}, 0, CPU)
    losses = {"retain": cross_entropy, "forget": negative_cross_entropy}
    return space, Passes(space, losses, {"forget": 1.0, "retain": 1.0}, feed=feed)


def gradients(model, forget, batch_size=8):
    """∇CE of every forget batch, by parameter, in eval mode."""
    model.eval()
    for x, y in zip(*(part.split(batch_size) for part in forget), strict=True):
        yield torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))


def trimmed(model, forget, **settings):
    """What `Trim` did to each parameter."""
    before = state(model)
    space, passes = opened(model, forget)
    with borrowed_random(CPU):
        Trim(**settings)(passes)
    space.close()
    return before, state(model)


class TestTrim:
    @pytest.mark.parametrize("make", [lambda: mlp(dtype=torch.float64), normed])
    @pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
    def test_what_is_salient_above_the_threshold_is_drawn_anew(self, sparsity, make):
        model, forget = make().train(), blobs(20, dtype=torch.float64)
        a = [sum(g.abs() for g in each) for each in zip(*gradients(model, forget), strict=True)]
        saliency = [(g * p).abs() for g, p in zip(a, model.parameters(), strict=True)]
        every = torch.cat([s.reshape(-1) for s in saliency]).sort().values
        limit = every[max(1, math.floor(sparsity * len(every) + 1e-9)) - 1]
        names = [name for name, _ in model.named_parameters()]
        before, after = trimmed(model.train(), forget, sparsity=sparsity)
        for name, s in zip(names, saliency, strict=True):
            chosen = isinstance(model.get_submodule(name.partition(".")[0]), nn.Linear)
            assert torch.equal(after[name] != before[name], (s > limit) & chosen), name

    def test_weights_are_kaiming_uniform_and_biases_zero(self):
        torch.manual_seed(3)
        model, forget = mlp(dtype=torch.float64), blobs(20, dtype=torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(5.0)
        before, after = trimmed(model, forget, sparsity=0.0)
        for name, fan in {"0": 6, "3": 12}.items():
            drawn = after[f"{name}.weight"][after[f"{name}.weight"] != before[f"{name}.weight"]]
            assert float(drawn.abs().max()) <= 1 / math.sqrt(fan)  # the bound of Kaiming-uniform with a = √5
            assert float(drawn.abs().max()) > 0.8 / math.sqrt(fan)
            changed = after[f"{name}.bias"] != before[f"{name}.bias"]
            assert changed.any()
            assert (after[f"{name}.bias"][changed] == 0).all()

    def test_normalisation_layers_and_layers_not_chosen_stay(self):
        for layers, moved in [(None, {"0", "3"}), ("3.*", {"3"}), (("0.*", "1.*"), {"0"})]:
            before, after = trimmed(normed(), blobs(20, dtype=torch.float64), sparsity=0.1, layers=layers)
            changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
            assert changed == moved, layers

    def test_a_vector_that_is_no_bias_stays(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale, self.inside = nn.Parameter(torch.rand(6)), nn.Linear(6, 4)

            def forward(self, x):
                return self.inside(x * self.scale)

        before, after = trimmed(Scaled().double(), blobs(20, dtype=torch.float64), sparsity=0.0)
        assert torch.equal(before["scale"], after["scale"])
        assert not torch.equal(before["inside.bias"], after["inside.bias"])

    def test_a_glob_without_a_match_is_refused_and_the_model_untouched(self):
        model = mlp()
        before = state(model)
        with pytest.raises(fastlur.ModelError, match=r"layers: 'layer4\.\*' matches no parameter"):
            run(model, blobs(12), blobs(20), method=fastlur.LUR(trim=Trim(layers="layer4.*")))
        assert same(before, state(model))

    @pytest.mark.parametrize("layers", ["1.*", ("1.*", "1.weight")])
    @pytest.mark.parametrize("form", [None, "cleaned", "as_published"])
    def test_a_glob_that_matches_normalisation_layers_alone_is_refused(self, form, layers):
        method = fastlur.LUR(trim=Trim(layers=layers))
        if form:
            method = fastlur.methods.ScissorHands(trim=None, layers=layers, form=form)
        model = normed()
        before = state(model)
        with pytest.raises(fastlur.ModelError, match=r"layers: '1\..*' matches nothing .*normalisation.* 0\.weight"):
            run(model, blobs(12, dtype=torch.float64), blobs(20, dtype=torch.float64), method=method)
        assert same(before, state(model))

    def test_it_is_the_same_every_time_and_touches_no_statistics(self):
        torch.manual_seed(0)
        forget = blobs(20, dtype=torch.float64)
        torch.manual_seed(1)
        _, one = trimmed(normed(), forget)
        torch.manual_seed(1)
        before, two = trimmed(normed(), forget)
        assert same(one, two)
        assert torch.equal(before["1.running_mean"], two["1.running_mean"])


class TestSaliencyMask:
    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_it_holds_the_largest_share_of_the_summed_gradient(self, share):
        model, forget = mlp(classes=2, dtype=torch.float64), blobs(20, classes=2, dtype=torch.float64)
        saliency = [sum(each).abs() for each in zip(*gradients(model, forget), strict=True)]
        every = torch.cat([s.reshape(-1) for s in saliency])
        order = every.argsort(descending=True)[: math.ceil(share * len(every) - 1e-9)]
        expected = torch.zeros(len(every), dtype=torch.bool)
        expected[order] = True
        space, passes = opened(model, forget)
        with borrowed_random(CPU):
            mask = SaliencyMask(share)(passes)
        assert torch.equal(torch.cat([view.reshape(-1) for view in mask.views]), expected)
        space.close()

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw", "custom"])
    def test_what_is_masked_out_does_not_move_weight_decay_or_not(self, optimizer):
        model, forget, retain = mlp(), blobs(12), blobs(20)
        model.eval()
        before = state(model)
        if optimizer == "custom":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        run(model, forget, retain, method=fastlur.LUR(mask=SaliencyMask(0.5)), optimizer=optimizer, weight_decay=0.5)
        after = state(model)
        moved = torch.cat([(before[name] != after[name]).reshape(-1) for name in before])
        assert 0.4 < float(moved.float().mean()) <= 0.51

    def test_the_saliency_is_that_of_the_trimmed_model(self):
        seen = []

        class Spy(SaliencyMask):
            def __call__(self, passes):
                seen.append(passes.space.copy())
                return super().__call__(passes)

        model, forget, retain = mlp(), blobs(12), blobs(20)
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        run(model, forget, retain, method=fastlur.LUR(trim=Trim(0.5), mask=Spy()), lr=0.0)
        at = torch.cat([view.reshape(-1) for view in seen[0].views])
        assert not torch.equal(at, before)
        assert torch.equal(at, torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


@pytest.mark.parametrize("part", [{"trim": Trim()}, {"mask": SaliencyMask()}])
def test_gradients_that_are_not_finite_leave_the_model_alone(part):
    model, broken = mlp(), blobs(12)
    before = state(model)
    fails = lambda m, batch: cross_entropy(m, batch) * (math.nan if len(batch[1]) == 4 else 1.0)  # the last batch
    with pytest.raises(fastlur.NonFiniteError, match="forget: a gradient"):
        run(model, broken, blobs(24), method=fastlur.LUR(**part), loss=fails)
    assert same(before, state(model))


def test_a_run_with_both_goes_on_bit_for_bit_after_an_interruption(tmp_path):
    method = fastlur.LUR(trim=Trim(0.5), mask=SaliencyMask())
    first, forget, retain = normed().float(), blobs(12), blobs(20)
    second = copy.deepcopy(first)
    third = copy.deepcopy(first)
    run(first, forget, retain, method=method, steps=4)
    options = {"method": method, "steps": 4, "checkpoint": tmp_path / "kept", "checkpoint_every": 1}
    with pytest.raises(Interrupted):
        run(second, forget, retain, callbacks=[interrupt], **options)
    steps = []
    run(third, forget, retain, callbacks=[lambda event: steps.append(event.step)], **options)
    assert steps == [2, 3, 4]  # a callback that raises leaves its own step unsaved
    assert same(state(first), state(third))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Trim(sparsity=1.1), "sparsity"),
        (lambda: Trim(batches=0), "batches"),
        (lambda: SaliencyMask(share=-0.1), "share"),
        (lambda: SaliencyMask(batches=1.5), "batches"),
        (lambda: fastlur.methods.resolve(fastlur.LUR(trim=0.9)), "trim"),
        (lambda: fastlur.methods.resolve(fastlur.LUR(mask=SaliencyMask)), "mask"),
        (lambda: fastlur.methods.resolve(fastlur.LUR), "Recipe"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, argument):
    with pytest.raises(fastlur.ArgumentError, match=argument):
        make()


class Upper:
    """A mask of the user's own that does not say what it is."""

    def __call__(self, passes):
        mask = passes.space.vector(torch.bool)
        for flat in mask.flats:
            flat[len(flat) // 2 :] = True
        return mask


def shrunk(passes, by=0.5):
    for flat in passes.space.theta.flats:
        flat.mul_(by)


def test_parts_of_ones_own_are_the_same_in_another_process():
    """Objects made anew have other addresses, as those of another process do."""
    methods = [fastlur.LUR(trim=functools.partial(shrunk, by=by), mask=Upper()) for by in (0.5, 0.5, 0.7)]
    first, again, other = (json.dumps(method.settings()) for method in methods)
    assert first == again != other
    assert " at 0x" not in first + json.dumps(fastlur.LUR(trim=shrunk).settings())
    assert f"{__name__}.shrunk" in first and f"{__name__}.Upper" in first


def test_a_run_with_parts_of_ones_own_goes_on(tmp_path):
    model, forget, retain = mlp(), blobs(12), blobs(20)
    whole, first = copy.deepcopy(model), copy.deepcopy(model)
    made = lambda: fastlur.LUR(trim=functools.partial(shrunk, by=0.9), mask=Upper())
    run(whole, forget, retain, method=made(), steps=4)
    options = {"steps": 4, "checkpoint": tmp_path / "kept", "checkpoint_every": 1}
    with pytest.raises(Interrupted):
        run(first, forget, retain, method=made(), callbacks=[interrupt], **options)
    run(model, forget, retain, method=made(), **options)
    assert same(state(model), state(whole))


def test_settings_are_plain_json_and_components_are_keywords_only():
    settings = fastlur.LUR(trim=Trim(layers=("a.*",)), mask=SaliencyMask()).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["trim"] == {"sparsity": 0.97, "layers": ["a.*"], "batches": None}
    assert fastlur.LUR(0.1, 0.3, "secant", "forget_first", True).trim is None
    with pytest.raises(TypeError):
        fastlur.LUR(0.1, 0.3, "secant", "forget_first", True, True, Trim())
