"""The frozen reference answers as the model did, and nobody can tell afterwards that it was asked."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import blobs, images, mlp, same, state
from torch import nn

import fastlur
from fastlur.fresh import reinitialise
from fastlur.frozen import Frozen
from fastlur.losses import cross_entropy
from fastlur.passes import Passes
from fastlur.space import ParameterSpace


def passes_over(model: nn.Module, **options) -> Passes:
    losses = {"forget": cross_entropy, "retain": cross_entropy}
    return Passes(
        ParameterSpace(model, options.pop("parameters", None)), losses, {"forget": 1.0, "retain": 1.0}, **options
    )


def disturb(model: nn.Module) -> None:
    """Other weights, and other statistics."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.add_(torch.rand_like(tensor))


class TestFrozen:
    def test_it_answers_as_the_model_did(self, cnn):
        x, y = images(6)
        cnn.eval()
        wanted = cnn(x).detach()
        reference = Frozen(passes_over(cnn))
        disturb(cnn)
        cnn.train()
        found = reference.logits((x, y))
        torch.testing.assert_close(found, wanted)
        assert not found.requires_grad
        assert not found.is_inference()

    def test_nothing_of_the_model_shows_that_it_was_asked(self, cnn):
        reference = Frozen(passes_over(cnn))
        disturb(cnn)
        cnn.train()
        cnn[3].eval()
        before, modes, buffers = state(cnn), [m.training for m in cnn.modules()], dict(cnn.named_buffers())
        reference.logits(images(6))
        reference.uphill(images(6), cross_entropy, 0.1)
        assert same(before, state(cnn))
        assert [m.training for m in cnn.modules()] == modes
        assert all(buffer is buffers[name] for name, buffer in cnn.named_buffers())
        assert all(norm.track_running_stats for norm in cnn.modules() if isinstance(norm, nn.BatchNorm2d))
        assert all(p.grad is None for p in cnn.parameters())
        assert torch.is_grad_enabled()

    def test_the_dropout_of_a_pass_is_the_same_whether_it_was_asked_or_not(self):
        found = []
        for asked in (False, True):
            torch.manual_seed(3)
            model = Noisy(mlp(dropout=0.5))
            passes = passes_over(model)
            reference, out = Frozen(passes), passes.space.vector()
            torch.manual_seed(4)
            batch = blobs(8)
            with passes.of_step(1, batch, batch):
                before = torch.get_rng_state()
                if asked:
                    reference.logits(batch)
                assert torch.equal(torch.get_rng_state(), before)
                passes.gradient("retain", out)
            found.append(out.flats[0].clone())
        assert torch.equal(*found)

    def test_a_module_that_draws_in_eval_mode_draws_the_same_in_every_run(self):
        found = []
        for seed in (1, 2):
            torch.manual_seed(0)
            model = Noisy(mlp())
            reference = Frozen(passes_over(model))
            batch = blobs(8)
            torch.manual_seed(seed)
            found.append(reference.logits(batch))
        assert torch.equal(*found)

    def test_it_refuses_to_be_asked_while_a_graph_is_alive(self):
        model, batch = mlp(), blobs(8)
        passes = passes_over(model)
        reference = Frozen(passes)

        def asks(m, b):
            reference.logits(b)
            return cross_entropy(m, b)

        before = state(model)
        with passes.of_step(1, batch, batch), pytest.raises(fastlur.ModelError, match="before the pass begins"):
            passes.gradient("retain", passes.space.vector(), loss=asks)
        assert same(before, state(model))

    def test_inside_a_displaced_block_it_is_still_the_reference(self):
        model, (x, y) = mlp(), blobs(8)
        passes = passes_over(model)
        reference, elsewhere = Frozen(passes), passes.space.vector()
        wanted = reference.logits((x, y))
        with passes.space.at(elsewhere):
            assert torch.equal(reference.logits((x, y)), wanted)
            assert all(not bool(p.any()) for p in model.parameters())

    def test_it_has_the_precision_of_the_passes(self):
        batch = blobs(8)
        model = mlp()
        assert Frozen(passes_over(copy.deepcopy(model), precision="bf16")).logits(batch).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert Frozen(passes_over(model)).logits(batch).dtype == torch.float32

    def test_autocast_does_not_serve_the_weights_of_another_point(self):
        model, batch = mlp(), blobs(8)
        passes = passes_over(model, precision="bf16")
        reference = Frozen(passes)
        wanted = reference.logits(batch)
        disturb(model)
        with passes.of_step(1, batch, batch):
            passes.gradient("retain", passes.space.vector())
            assert torch.equal(reference.logits(batch), wanted)

    def test_a_step_uphill_raises_the_loss_and_leaves_tokens_alone(self):
        model, (x, y) = mlp(), blobs(8)
        reference = Frozen(passes_over(model))
        for batch in ((x, y), {"input": x, "labels": y}):
            moved = reference.uphill(batch, cross_entropy, 0.1)
            there = moved["input"] if isinstance(moved, dict) else moved[0]
            with torch.no_grad():
                assert float(cross_entropy(model, (there, y))) > float(cross_entropy(model, (x, y)))
            torch.testing.assert_close((there - x).abs(), (0.1 * x.std(correction=0)).expand_as(x))
        tokens = torch.randint(0, 5, (8, 3)), y
        assert reference.uphill(tokens, cross_entropy, 0.1) is tokens

    def test_a_buffer_made_by_its_forward_goes_again(self):
        class Growing(nn.Linear):
            def forward(self, input):
                self.register_buffer("seen", input.detach().mean())
                return super().forward(input)

        model = Growing(6, 4)
        Frozen(passes_over(model)).logits(blobs(8))
        assert "seen" not in model._buffers


class Noisy(nn.Module):
    """Draws random numbers in every mode."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input):
        return self.body(input + torch.randn_like(input))


class TestReinitialise:
    def test_new_weights_in_the_vector_and_the_model_as_it_was(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        model.extra = nn.Parameter(torch.arange(50.0))
        torch.manual_seed(7)
        fresh = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        disturb(model)
        model[2].bias.requires_grad_(False)
        passes = passes_over(model)
        before = state(model)
        out = passes.space.vector()
        torch.manual_seed(7)
        with passes.statistics.at(passes.statistics.copies()):
            reinitialise(passes, out, shuffle=True)
            assert float(model[1].running_mean.abs().max()) == 0
        assert same(before, state(model))
        found = dict(zip(passes.space.names, out.views, strict=True))
        for name, value in fresh.named_parameters():
            if name != "2.bias":
                torch.testing.assert_close(found[name], value.detach())
        assert not torch.equal(found["extra"], before["extra"])
        assert torch.equal(found["extra"].sort().values, before["extra"].sort().values)
