"""What every method owes, whatever it does: found by its presence, it is tested by its presence."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math

import pytest
import torch
from helpers import Interrupted, blobs, images, interrupt, mlp, run, same, state
from torch import nn

import fastlur
from fastlur.data import Feed, source
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.passes import Passes
from fastlur.step import Step

NAMES = sorted(METHODS)
STEPPING = [name for name in NAMES if METHODS[name].steps != 0]

PROMISED = (
    "lur ltu mox scissorhands salun random_label gradient_ascent neggrad_plus fine_tune l1_sparse pcgrad gru eupmu "
    "selective_amnesia boundary_shrink boundary_expand ssd scrub bad_teacher retrain"
)


def bare(name, **settings):
    """The method without what it does to the weights before the first step."""
    return dataclasses.replace(METHODS[name](), trim=None, **settings)


def stepping(model, method, forget, retain, losses=None, **options) -> Step:
    """A step over the model with the data at hand, as `unlearn` assembles it."""
    sources = {"forget": source(forget, "forget", 8), "retain": source(retain, "retain", 8)}
    losses = losses or {"retain": cross_entropy, "forget": method.default_forget_loss("classification")}
    return Step(model, method, losses, feed=Feed(sources, 0, torch.device("cpu")), steps=9, **options)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def test_they_are_all_there():
    assert set(NAMES) == set(PROMISED.split()) == set(fastlur.methods.available())
    assert all(METHODS[name].name == name for name in NAMES)
    assert all(getattr(fastlur.methods, METHODS[name].__name__) is METHODS[name] for name in NAMES)


def test_two_methods_of_one_name_are_an_error():
    class Other(METHODS["ssd"]):
        name = "lur"

    with pytest.raises(ImportError, match=r"Other and fastlur\.methods\.lur\.LUR both have the name 'lur'; rename"):
        fastlur.methods._by_name([METHODS["ssd"], Other, METHODS["lur"]])
    assert fastlur.methods._by_name([METHODS["ssd"], METHODS["lur"], METHODS["ssd"]]).keys() == {"lur", "ssd"}


@pytest.mark.parametrize("name", NAMES)
class TestEveryMethod:
    def test_says_what_it_does_and_what_that_costs(self, name):
        line = fastlur.methods.available()[name]
        assert line == f"{METHODS[name].__doc__.strip().splitlines()[0]} ({METHODS[name]().cost})"
        assert METHODS[name].__doc__[0].isupper()
        assert "Source:" in METHODS[name].__doc__ or "econstructed" in METHODS[name].__doc__

    def test_its_settings_are_plain_json_and_a_preset_is_a_call_of_unlearn(self, name):
        assert json.loads(json.dumps(METHODS[name]().settings())) == METHODS[name]().settings()
        for preset in METHODS[name].presets:
            settings = fastlur.methods.preset(name, preset)
            assert isinstance(settings["method"], METHODS[name])
            assert set(settings) <= set(inspect.signature(fastlur.unlearn).parameters)

    def test_the_same_call_gives_the_same_model(self, name, cnn):
        twin, data = copy.deepcopy(cnn), (images(12), images(20))
        run(cnn, *data, method=name)
        torch.rand(3)  # a caller's own draws in between do not matter
        run(twin, *data, method=name)
        assert same(state(cnn), state(twin))

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_an_interrupted_run_goes_on_bit_for_bit(self, name, optimizer, tmp_path):
        model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 4))
        twin, data = copy.deepcopy(model), (blobs(12), blobs(40))
        options = {"method": name, "optimizer": optimizer, "steps": 7}
        run(twin, *data, **options)
        first = copy.deepcopy(model)
        saving = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
        if METHODS[name].steps != 0:
            with pytest.raises(Interrupted):
                run(first, *data, callbacks=[interrupt], **options, **saving)
        done = run(model, *data, **options, **saving)
        assert same(state(model), state(twin))
        assert len(done.history["step"]) == (7 if METHODS[name].steps != 0 else 0)

    def test_the_model_leaves_as_it_came(self, name, cnn):
        cnn[0].weight.requires_grad_(False)
        cnn.train()
        cnn[3].eval()
        before = list(cnn.named_parameters()), [m.training for m in cnn.modules()], cnn[0].weight.clone()
        wanting = [p.requires_grad for p in cnn.parameters()]
        run(cnn, method=name)
        assert all(p is q for (_, p), (_, q) in zip(before[0], cnn.named_parameters(), strict=True))
        assert all(p.grad is None for p in cnn.parameters())
        assert [m.training for m in cnn.modules()] == before[1]
        assert [p.requires_grad for p in cnn.parameters()] == wanting
        assert torch.equal(cnn[0].weight, before[2])
        assert len({p.untyped_storage().data_ptr() for p in cnn.parameters()}) == len(list(cnn.parameters()))
        moved = int(cnn[1].num_batches_tracked)
        assert moved <= (0 if METHODS[name].steps == 0 else 3)  # at most one retain pass a step
        copy.deepcopy(cnn)

    @pytest.mark.parametrize("sizes", [(1, 20), (30, 10)])
    def test_a_single_forget_item_and_more_to_forget_than_to_keep(self, name, sizes, cnn):
        result = run(cnn, images(sizes[0]), images(sizes[1]), method=name, epochs=2, steps=None)
        assert all(bool(torch.isfinite(value).all()) for value in state(cnn).values())
        assert name in result.summary()

    @pytest.mark.filterwarnings("ignore:MOX")  # which says that such gradients leave the model as given
    def test_gradients_that_vanish_coincide_or_cancel_do_no_harm(self, name):
        nothing = lambda model, batch: cross_entropy(model, batch) * 0.0 + 1.0
        cases = {
            "zero": (nothing, nothing),
            "the same": (cross_entropy, cross_entropy),
            "opposite": (cross_entropy, negative_cross_entropy),
        }
        # what minimises more than the two losses moves without them; and logarithms want a positive forget loss
        stays = not METHODS[name].own_objective and name != "l1_sparse"
        if name == "eupmu":
            del cases["opposite"]
        for case, (keep, go) in cases.items():
            model, data = mlp(), blobs(8)
            start = flat(model)
            with stepping(model, METHODS[name](), data, data, {"retain": keep, "forget": go}) as step:
                for _ in range(3 if METHODS[name].steps != 0 else 0):
                    step(data, data)
                step.finish()
            assert bool(torch.isfinite(flat(model)).all()), case
            assert case != "zero" or not stays or torch.equal(flat(model), start)


# How much of ∇ the first step goes along where the gradient of either side, of whatever loss, is ∇ or, opposite, −∇ for
# the forget data. The sum of both, unless one side is all that counts or a conflict is removed.
ALONG = dict.fromkeys(NAMES, (2.0, 0.0))
ALONG |= dict.fromkeys(("fine_tune", "retrain", "l1_sparse", "scrub"), (1.0, 1.0))  # SCRUB begins with a min-step
ALONG |= {"gradient_ascent": (0.1, -0.1), "gru": (2.0, 1.0), "ltu": (4.0, 2.0), "ssd": (0.0, 0.0)}


@pytest.mark.filterwarnings("ignore:MOX")
@pytest.mark.parametrize("case", ["zero", "the same", "opposite"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_its_own_objective_may_vanish_coincide_or_cancel(name, case, monkeypatch):
    """Whatever a method minimises: what comes back from a pass is put in place of its gradient."""
    model, real, data = mlp(), Passes.gradient, blobs(8)
    start = flat(model)
    unit = torch.randn(len(start))
    unit /= unit.norm()
    signs = {"zero": (0.0, 0.0), "the same": (1.0, 1.0), "opposite": (1.0, -1.0)}[case]

    def gradient(self, which, out, at=None, *, add=False, **keywords):
        before = [view.clone() for view in out.views] if add else None
        real(self, which, out, at, **keywords)
        parts = unit.split([view.numel() for view in out.views])
        for index, (view, part) in enumerate(zip(out.views, parts, strict=True)):
            view.copy_(part.view_as(view) * signs[which == "forget"]).add_(before[index] if add else 0.0)

    monkeypatch.setattr(Passes, "gradient", gradient)
    settings = {"ssd": {}, "l1_sparse": {"gamma": 1e-4}}.get(name, {"mask": SaliencyMask(1)})
    with stepping(model, bare(name, **settings), data, data, lr=0.5, momentum=0.0) as step:
        if METHODS[name].steps != 0:
            step(data, data)
        moved = (start - flat(model)) / 0.5
        along = {"zero": 0.0, "the same": ALONG[name][0], "opposite": ALONG[name][1]}[case]
        torch.testing.assert_close(moved, along * unit, rtol=1e-3, atol=2e-4 if name == "l1_sparse" else 1e-6)
        for _ in range(3 if METHODS[name].steps != 0 else 0):
            step(data, data)
        step.finish()
    assert bool(torch.isfinite(flat(model)).all())
    if case == "zero" and name != "l1_sparse":  # whose penalty goes on
        assert torch.equal(flat(model), start)


@pytest.mark.parametrize("name", STEPPING)
class TestEveryStep:
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_masked_weights_stay_whatever_the_weight_decay(self, name, optimizer):
        model = mlp()
        before, options = flat(model), {"weight_decay": 0.5, "optimizer": optimizer, "lr": 1e-3}
        run(model, blobs(12), blobs(20), method=bare(name, mask=SaliencyMask(0.3)), **options)
        assert 0 < float((flat(model) != before).float().mean()) <= 0.31

    def test_weight_decay_moves_what_no_mask_holds(self, name):
        model, twin = mlp(), mlp()
        twin.load_state_dict(model.state_dict())
        data = blobs(12), blobs(20)
        for each, decay in ((model, 0.0), (twin, 0.5)):
            run(each, *data, method=bare(name, mask=None), weight_decay=decay, lr=1e-3)
        assert not torch.equal(flat(model), flat(twin))

    def test_a_trim_comes_before_everything_else(self, name):
        """Without a learning rate it is all that happens; what a method keeps as the model as given is trimmed too."""
        model, data = mlp(), (blobs(12), blobs(20))
        twin, before = copy.deepcopy(model), flat(model)
        run(twin, *data, method=METHODS["fine_tune"](trim=Trim(0.5)), lr=0.0)
        run(model, *data, method=dataclasses.replace(bare(name, mask=None), trim=Trim(0.5)), lr=0.0)
        assert not torch.equal(flat(twin), before)
        assert torch.equal(flat(model), flat(twin))


def test_what_only_looks_like_a_method_is_refused_before_anything_happens():
    class Alike:
        prepare = direction = finish = lambda *arguments: None

    class Stateless(METHODS["fine_tune"]):
        def prepare(self, passes):
            return None

    model = mlp()
    before = state(model)
    with pytest.raises(fastlur.ArgumentError, match=r"method=.*Recipe"):
        run(model, blobs(8), blobs(8), method=Alike())
    with pytest.raises(fastlur.ArgumentError, match="prepare of Stateless must return a State"):
        run(model, blobs(8), blobs(8), method=Stateless())
    assert same(before, state(model))


def test_a_method_without_steps_is_a_whole_run():
    asked = []
    model = mlp()
    result = run(model, blobs(12), blobs(20), method="ssd", steps=50, stop=lambda event: asked.append(event) or "no")
    assert len(result.history["step"]) == 0
    assert result.ended == "all steps done"
    assert "0 steps" in result.summary()
    assert not asked


def test_directions_are_clipped_as_is_usual_with_the_method_unless_told_otherwise():
    (x, y), retain = blobs(12), blobs(40)
    forget, start = (x * 100, y), mlp()  # gradients are far above 1
    for name, usual in (("lur", 1.0), ("neggrad_plus", math.inf)):
        weights, recorded = {}, {}
        for given in (None, 1.0, math.inf):
            model = copy.deepcopy(start)
            found = run(model, forget, retain, method=name, max_grad_norm=given, optimizer="sgd")
            weights[given], recorded[given] = state(model), found.settings["max_grad_norm"]
        assert same(weights[None], weights[usual])
        assert not same(weights[1.0], weights[math.inf])
        assert recorded == {None: None if usual == math.inf else usual, 1.0: 1.0, math.inf: None}
