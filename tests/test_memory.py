"""Out of memory: the model takes a batch in parts from then on, and nothing else changes; or it is refused, by name."""

from __future__ import annotations

import copy
import types
import warnings
from typing import NamedTuple

import pytest
import torch
from checkpoints import break_off, go_on, job
from helpers import MODES, blobs, mlp, run, same, state
from torch import nn

import fastlur
from fastlur.data import Feed, source
from fastlur.frozen import Frozen
from fastlur.losses import BoundedForgetting, cross_entropy
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.methods.relabelling import random_label_loss
from fastlur.microbatch import MicroBatches
from fastlur.passes import Passes
from fastlur.space import ParameterSpace
from fastlur.world import derive

pytestmark = pytest.mark.filterwarnings("ignore:memory ran out", "ignore:MOX")


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch):
    monkeypatch.setattr("fastlur.microbatch.gc.collect", lambda: 0)  # most of the time that these tests would take


class Full(torch.autograd.Function):
    """Runs out of memory on the way back."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.short = len(x) > limit
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.short:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradient, None


class Hungry(nn.Module):
    """Has memory for so many items; a third layer makes the middle of a backward pass a place to fail in."""

    def __init__(self, limit=10**9, fails="forward", dropout=0.0, layer=None):
        super().__init__()
        self.limit, self.fails, self.calls = limit, fails, []
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop, self.layer = nn.Dropout(dropout), layer if layer is not None else nn.LayerNorm(8)
        self.double()

    def forward(self, x):
        self.calls.append(len(x))
        if self.fails == "forward" and len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        x = self.layer(torch.tanh(self.first(x)))
        if self.fails == "backward":
            x = Full.apply(x, self.limit)
        return self.third(self.drop(torch.tanh(self.second(x))))


class Pair(NamedTuple):
    logits: torch.Tensor
    again: torch.Tensor


def wide(n):
    return blobs(n, dtype=torch.float64)


def twins(limit, **more):
    """The same model twice, one of which has memory for `limit` items."""
    torch.manual_seed(1)
    model = Hungry(**more)
    short = copy.deepcopy(model)
    short.limit = limit
    return model, short


def passes_of(model, batch, losses=None, seed=0):
    space = ParameterSpace(model)
    feed = Feed({side: source(batch, side, 8) for side in ("forget", "retain")}, 0, torch.device("cpu"))
    losses = losses or {"forget": BoundedForgetting(), "retain": cross_entropy}
    return Passes(space, losses, {"forget": 1.0, "retain": 1.0}, feed=feed, seed=seed)


def close(a, b):
    for one, other in zip(a.views, b.views, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


LOSSES = {
    "cross-entropy": cross_entropy,
    "beyond its cap": BoundedForgetting(0.1),
    "below its cap": BoundedForgetting(50.0),
    "random labels": random_label_loss,
    "logarithm": lambda model, batch: cross_entropy(model, batch).log() ** 2,
    "of the whole batch": lambda model, batch: model(batch[0]).std(0).max(),
    "two forwards": lambda model, batch: cross_entropy(model, batch) * model(batch[0] + 1).square().mean(),
    "of a parameter": lambda model, batch: cross_entropy(model, batch) + model.first.weight.square().sum(),
}


class TestPasses:
    @pytest.mark.parametrize("fails", ["forward", "backward"])
    @pytest.mark.parametrize("limit", [12, 3])
    @pytest.mark.parametrize("name", LOSSES)
    def test_the_gradient_is_that_of_the_whole_batch(self, name, limit, fails):
        found, batch = [], wide(13)
        for model in twins(limit, fails=fails):
            passes = passes_of(model, batch)
            out, point = passes.space.vector(), passes.space.copy()
            for flat in point.flats:
                flat.mul_(1.1)
            with passes.of_step(3, batch, batch):
                passes.gradient("forget", out, loss=LOSSES[name], weight=0.7)
                passes.gradient("retain", out, point, loss=LOSSES[name], add=True)
            found.append((out, passes.values, set(passes.space.reached)))
        close(found[0][0], found[1][0])
        assert found[0][2] == found[1][2]
        for side in ("forget", "retain"):
            torch.testing.assert_close(found[0][1][side], found[1][1][side], rtol=1e-12, atol=0)

    @pytest.mark.parametrize("add", [False, True])
    def test_a_backward_pass_that_fails_halfway_counts_nothing_twice(self, add):
        """The third and second layers' gradients have arrived when it fails."""
        found, batch = [], wide(12)
        for model in twins(5, fails="backward"):
            passes = passes_of(model, batch)
            out = passes.space.vector()
            for flat in out.flats:
                flat.fill_(0.25)
            with passes.of_step(1, batch, batch):
                passes.gradient("retain", out, add=add)
            found.append(out)
        close(*found)

    def test_the_first_time_it_says_so_and_then_it_keeps_to_it(self):
        _, model = twins(5)
        batch = wide(20)
        passes = passes_of(model, batch)
        out = passes.space.vector()
        with passes.of_step(1, batch, batch):
            with pytest.warns(UserWarning, match="memory ran out with (20|10) items at a time.*2.00 GiB") as said:
                passes.gradient("retain", out)
            assert len(said) == 2
            assert passes.spare.rows == 5
            model.calls.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                passes.gradient("retain", out)
        assert model.calls == [5] * 8  # each part forward and, in the backward pass, again

    def test_without_need_the_model_itself_is_called(self):
        model, _ = twins(9)
        batch, seen = wide(8), []
        passes = passes_of(model, batch)
        with passes.of_step(1, batch, batch):
            passes.gradient("retain", passes.space.vector(), loss=lambda m, b: seen.append(m) or cross_entropy(m, b))
        assert seen == [model]
        assert model.calls == [8]

    def test_dropout_has_one_mask_a_pass_the_same_again_in_the_backward_and_in_the_other_pass(self):
        _, model = twins(4, dropout=0.5)
        batch = wide(8)
        passes = passes_of(model, batch)
        outs = [passes.space.vector() for _ in range(3)]
        with passes.of_step(2, batch, batch):
            for out in outs:
                passes.gradient("retain", out)
        close(outs[1], outs[2])
        torch.manual_seed(derive(0, 2, "retain"))
        logits = torch.cat([model.train()(part) for part in batch[0].split(4)])
        loss = cross_entropy(lambda _: logits, batch)
        wanted = torch.autograd.grad(loss, list(model.parameters()))
        for view, gradient in zip(outs[1].views, wanted, strict=True):
            torch.testing.assert_close(view, gradient, rtol=1e-12, atol=1e-14)

    def test_a_frozen_reference_and_a_step_uphill(self):
        found, batch = [], wide(9)
        for model in twins(4):
            passes = passes_of(model, batch)
            frozen = Frozen(passes)
            uphill = frozen.uphill(batch, cross_entropy, 0.3)[0]
            with passes.aside({"retain": batch}):
                found.append((frozen.logits(batch), uphill, passes.value("retain")))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("kind", ["dict", "object", "tuple", "named", "cache"])
    def test_inputs_and_outputs_of_other_forms(self, kind):
        class Form(Hungry):
            def forward(self, x, scale, mask=None):
                out = super().forward(x * scale) * (1 if mask is None else mask[:, None])
                match kind:
                    case "dict":
                        return {"logits": out, "loss": None}
                    case "object":
                        return types.SimpleNamespace(logits=out, hidden=object())
                    case "cache":
                        return {"logits": out, "cache": object(), "loss": out.sum()}
                    case "named":
                        return Pair(out, out)
                return out, [out]

        def loss(model, batch):
            out = model(batch["x"], batch["scale"], mask=batch["mask"])
            logits = out["logits"] if isinstance(out, dict) else getattr(out, "logits", None)
            logits = out[0] + out[1][0] if kind == "tuple" else logits
            return nn.functional.cross_entropy(logits, batch["labels"])

        x, y = wide(11)
        batch = {"x": x, "scale": torch.tensor(1.5), "mask": torch.rand(11).double(), "labels": y}
        found = []
        torch.manual_seed(1)
        model = Form()
        short = copy.deepcopy(model)
        short.limit = 3
        for each in (model, short):
            passes = passes_of(each, wide(8), {"forget": loss, "retain": loss})
            out = passes.space.vector()
            with passes.of_step(1, batch, batch):
                passes.gradient("retain", out)
            found.append(out)
        assert 3 in short.calls
        close(*found)


def memory_for(limit, steps=3, forget=12, retain=40, model=None, **options):
    """Runs of the same model with and without enough memory: both models, and the result of the latter."""
    torch.manual_seed(1)
    model = Hungry() if model is None else model
    data = wide(forget), wide(retain)
    short = copy.deepcopy(model)
    short.limit = limit
    options = {"steps": steps, "batch_size": 12} | options
    run(model, *data, **options)
    return model, short, run(short, *data, **options)


class TestRuns:
    @pytest.mark.parametrize("fails", ["forward", "backward"])
    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_every_method_ends_where_it_would_have_ended(self, name, fails):
        model, short, result = memory_for(5, method=name, model=Hungry(fails=fails))
        assert result.settings["micro_batch"] in (3, 5) or METHODS[name].steps == 0
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("gradient", [mode for mode in MODES if mode != "exact"])
    @pytest.mark.parametrize("order", ["retain_first", "forget_first"])
    def test_every_gradient_of_lur_but_the_exact_one(self, gradient, order):
        method = fastlur.LUR(gradient=gradient, order=order, trim=Trim(0.5), mask=SaliencyMask(0.5))
        model, short, _ = memory_for(5, method=method)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("keep_graph", [True, False])
    def test_the_exact_one_says_what_to_do(self, keep_graph):
        model, seen = Hungry(50), {}

        def shrink(event):
            seen[event.step] = state(event.model)
            model.limit = 5 if event.step == 2 else 50

        method = fastlur.LUR(gradient="exact", keep_graph=keep_graph)
        with pytest.raises(fastlur.ModelError, match=r"gradient='exact' ran out of memory .*use 'optimistic' or"):
            run(model, wide(12), wide(40), method=method, batch_size=12, steps=5, callbacks=[shrink])
        assert same(state(model), seen[2])

    def test_it_is_found_out_before_anything_changes_and_recorded(self):
        _, short = twins(5)
        with pytest.warns(UserWarning, match="memory ran out with 12 items"):
            result = run(short, wide(12), wide(40), batch_size=12, steps=2)
        assert result.settings["micro_batch"] == 3
        _, short = twins(50)
        assert run(short, wide(12), wide(40), batch_size=12, steps=2).settings["micro_batch"] is None

    @pytest.mark.parametrize("fails", ["forward", "backward"])
    @pytest.mark.parametrize("method", ["lur", "eupmu", "scissorhands", "boundary_expand"])
    def test_on_the_way_too(self, method, fails):
        model, short = twins(50, fails=fails)
        data = wide(12), wide(40)

        def shrink(event):
            short.limit = 5 if event.step == 3 else short.limit

        run(model, *data, steps=6, batch_size=12, method=method)
        with pytest.warns(UserWarning, match="takes 3 at a time"):
            run(short, *data, steps=6, batch_size=12, callbacks=[shrink], method=method)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def test_an_interrupted_run_goes_on_in_the_same_parts_bit_for_bit(self, tmp_path):
        """Whatever memory there is when it goes on: other parts would be other roundings."""
        model, data, options = job(tmp_path, Hungry(5, dropout=0.2), batch_size=12)
        data = tuple((x.double(), y) for x, y in data)
        whole = copy.deepcopy(model)
        left_out = ("checkpoint", "checkpoint_every")
        fastlur.unlearn(whole, *data, **{k: v for k, v in options.items() if k not in left_out})
        break_off(model, data, options)
        richer = copy.deepcopy(model)
        richer.limit = 10**9
        resumed, steps = go_on(richer, data, options)
        assert steps[0] == 5
        assert same(state(resumed), state(whole))

    def test_a_step_of_ones_own(self):
        model, short = twins(5)
        batches = [(wide(12), wide(12)) for _ in range(3)]
        for each in (model, short):
            with fastlur.MetaStep(each) as step:
                for pair in batches:
                    step(*pair)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


class MinusMean(nn.Module):
    """Looks at the whole batch, and is no layer that anybody knows."""

    def forward(self, x):
        return x - x.mean(0)


class Counts(nn.Module):
    """Counts its forwards in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Balances(nn.Module):
    """Leaves a value on itself that a loss may add, as a mixture of experts does."""

    def forward(self, x):
        self.balance = x.square().mean()
        return x


class Remembers(nn.Module):
    """Leaves on itself what does not depend on the batch, such as a table of angles."""

    def forward(self, x):
        self.angles = torch.arange(x.shape[1], dtype=x.dtype).cos()
        return x * self.angles


REFUSED = {
    "batch norm": (lambda: nn.BatchNorm1d(8), "'layer', a BatchNorm1d, normalises by the whole batch"),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(8, track_running_stats=False),
        "'layer', a BatchNorm1d, normalises by the whole batch",
    ),
    "a layer of one's own": (MinusMean, "its outputs depend on the whole batch"),
    "a counter": (Counts, "a forward moves its buffers"),
    "a note": (Balances, "a forward leaves 'layer.balance' on it, in parts that of the last"),
}


class TestRefused:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_looks_at_the_whole_batch_is_refused_before_anything_changes(self, case):
        make, said = REFUSED[case]
        model = Hungry(5, layer=make())
        before = state(model)
        with pytest.raises(fastlur.ModelError, match=f"memory ran out with .*{said}.*lower batch_size") as caught:
            run(model, wide(12), wide(40), batch_size=12, method=fastlur.LUR(trim=Trim(0.1)))
        assert "\n" not in str(caught.value)
        assert same(state(model), before)
        assert model.training

    def test_a_note_that_is_the_same_for_any_batch_is_no_obstacle(self):
        model, short, _ = memory_for(5, model=Hungry(layer=Remembers()))
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def test_on_the_way_the_model_is_as_after_the_last_step(self):
        model, seen = Hungry(50, layer=nn.BatchNorm1d(8)), {}

        def shrink(event):
            seen[event.step] = state(event.model)
            model.limit = 5 if event.step == 3 else 50

        with pytest.raises(fastlur.ModelError, match="BatchNorm1d"):
            run(model, wide(12), wide(40), batch_size=12, steps=6, callbacks=[shrink])
        assert same(state(model), seen[3])

    def test_batch_norm_that_keeps_its_statistics_is_no_obstacle(self):
        """Passes of this method run in eval mode."""
        model = Hungry(layer=nn.BatchNorm1d(8)).eval()
        model, short, _ = memory_for(5, method="gradient_ascent", model=model)
        for one, other in zip(model.parameters(), short.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize(
        ("limit", "fails", "said"),
        [
            (0, "backward", "with one item at a time"),
            (0, "forward", "too few to see"),
            (1, "forward", "too few to see"),
        ],
    )
    def test_a_model_that_is_too_large_for_one_item_or_for_two(self, limit, fails, said):
        model = Hungry(limit, fails)
        before = state(model)
        with pytest.raises(fastlur.ModelError, match=f"memory ran out .*{said}"):
            run(model, wide(12), wide(40), batch_size=12)
        assert same(state(model), before)

    @pytest.mark.parametrize("output", [lambda x: x.sum(), lambda x: x.t(), lambda x: "text", lambda x: (x, object())])
    def test_outputs_that_cannot_be_put_together(self, output):
        made = MicroBatches(mlp(), lambda x: output(x), 2, {True})
        with pytest.raises(fastlur.ModelError, match=r"model: returned .*lower batch_size"):
            made(torch.randn(5, 6))

    def test_a_model_in_parts_has_the_models_attributes(self):
        model = mlp()
        made = MicroBatches(model, model, 2, set())
        assert made.training
        assert made.state_dict().keys() == model.state_dict().keys()
        x = torch.randn(7, 6)
        torch.testing.assert_close(made(x), model(x))
