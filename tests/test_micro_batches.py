"""A pass whose batch is taken in parts, because memory ran out: the gradient is that of the whole batch."""

from __future__ import annotations

import copy
import types
import warnings
from typing import NamedTuple

import pytest
import torch
from hungry import Hungry, twins, wide
from torch import nn

from fastlur.data import Feed, source
from fastlur.frozen import Frozen
from fastlur.losses import BoundedForgetting, cross_entropy
from fastlur.methods.relabelling import random_label_loss
from fastlur.passes import Passes
from fastlur.space import ParameterSpace
from fastlur.world import derive

pytestmark = [pytest.mark.usefixtures("no_collecting"), pytest.mark.filterwarnings("ignore:memory ran out")]


class Pair(NamedTuple):
    logits: torch.Tensor
    again: torch.Tensor


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
