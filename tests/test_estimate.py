"""`estimate`: what it counts, that it leaves no trace, and what it refuses."""

from __future__ import annotations

import dataclasses
import random
import sys

import numpy as np
import pytest
import torch
from helpers import blobs, images, mlp, run, same, state
from torch import nn

import fastlur
from fastlur import footprint, ops, space
from fastlur.errors import ArgumentError, DataError, ModelError
from fastlur.losses import BoundedForgetting
from fastlur.methods import METHODS, SaliencyMask, Trim
from fastlur.targets import SecondChoice

CPU = torch.device("cpu")


class Deep(nn.Module):
    """Activations many times the weights: tanh saves its output, the linear layer after it the very same tensor."""

    def __init__(self, depth: int = 20, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch(n: int, width: int = 32, classes: int = 10):
    return torch.randn(n, width), torch.randint(0, classes, (n,))


def size(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


@dataclasses.dataclass(frozen=True)
class Training(fastlur.methods.Recipe):
    @property
    def cost(self):
        return fastlur.methods.Cost(passes=1)


class Judging(Training):
    training = False


class TestFootprint:
    def test_what_is_allocated_released_and_kept(self):
        kept = []

        def first():
            kept.append(torch.empty(1000))
            torch.empty(5000)

        one, two, three = footprint.memory([first, lambda: torch.empty(2000), kept.clear], CPU)
        assert one == (24_000, 4_000)
        assert two == (12_000, 4_000)
        assert three == (4_000, 0)

    def test_temporaries_inside_an_operation_are_seen(self):
        x = torch.randn(10_000)
        ((peak, left),) = footprint.memory([lambda: x.kthvalue(3)], CPU)
        assert peak >= 2 * x.nbytes
        assert left == 0

    def test_a_threshold_is_found_in_the_memory_of_one_copy(self):
        x = torch.randn(100_000)
        ((peak, _),) = footprint.memory([lambda: ops.threshold(x, 0.9)], CPU)
        assert peak <= 1.01 * x.nbytes

    def test_two_profilers_are_refused(self):
        with torch.autograd.profiler.profile(), pytest.raises(ArgumentError, match="profiler"):
            footprint.memory([lambda: None], CPU)

    def test_it_says_nothing(self, capfd):
        footprint.memory([lambda: torch.empty(10)], CPU)
        assert capfd.readouterr() == ("", "")


class TestParts:
    def test_activations_are_those_that_autograd_saves(self):
        model, data = Deep(), batch(512)
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fastlur.losses.cross_entropy(model, data)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *data)}
        expected = sum(nbytes for place, nbytes in saved.items() if place not in own)
        assert expected > 10 * size(model)
        found = fastlur.estimate(model, data).activations
        assert expected <= found <= 1.25 * expected  # and some cotangents

    @pytest.mark.parametrize(
        ("method", "vectors"), [("lur", 3), ("neggrad_plus", 2), ("fine_tune", 1), ("scissorhands", 2), ("salun", 2.25)]
    )
    @pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("adamw", 2)])
    def test_vectors_are_multiples_of_the_weights(self, method, vectors, optimizer, states):
        model = Deep()
        found = fastlur.estimate(model, batch(4), method, optimizer=optimizer)
        assert found.parameters == size(model)
        assert found.vectors == vectors * size(model)
        assert found.optimizer == states * size(model)
        assert found.batch == 2 * (4 * 32 * 4 + 4 * 8)
        parts = found.parameters, found.vectors, found.optimizer, found.activations, found.batch, found.other
        assert found.peak == sum(parts)
        assert 0 < found.activations < size(model) / 2
        assert found.seconds > 0

    def test_only_what_moves_has_vectors(self):
        model = Deep()
        whole, part = (fastlur.estimate(model, batch(64), parameters=chosen) for chosen in (None, "layers.19.*"))
        assert part.parameters == whole.parameters
        assert part.vectors == whole.vectors // 20
        assert part.activations < whole.activations / 4

    def test_buffers_are_held_twice(self, cnn):
        found = fastlur.estimate(cnn, images(8), forget_loss=fastlur.losses.BoundedForgetting())
        buffers = sum(b.nbytes for b in cnn.buffers())
        assert found.parameters >= size(cnn) + buffers
        assert found.other == buffers

    def test_a_mask_of_the_users_is_a_byte_a_weight_and_salun_counts_its_own(self):
        model = Deep()
        bare, masked = (fastlur.estimate(model, batch(64), fastlur.LUR(mask=m)) for m in (None, SaliencyMask()))
        assert masked.vectors - bare.vectors == size(model) // 4
        without = fastlur.estimate(model, batch(64), METHODS["salun"](mask=None))
        assert without.vectors == 2 * size(model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_a_mask_is_a_byte_a_weight_whatever_its_type(self, dtype):
        model, (x, y) = Deep().to(dtype), batch(64)
        count, parts = sum(p.numel() for p in model.parameters()), {"trim": None, "mask": None}
        found = lambda method: fastlur.estimate(model, (x.to(dtype), y), method).vectors
        for name in ("lur", "gradient_ascent"):  # which has one of its own
            bare, masked = (found(METHODS[name](**parts | {"mask": mask})) for mask in (None, SaliencyMask()))
            assert masked - bare == count
        assert found("gradient_ascent") == size(model) + count

    def test_a_trim_counts_where_it_holds_more_than_a_step(self):
        model, one = Deep(), METHODS["fine_tune"]
        plain, trimmed = (fastlur.estimate(model, batch(1), one(trim=trim)) for trim in (None, Trim()))
        # a vector and a quarter more, where the activations of a step are less
        assert trimmed.peak == plain.peak + 1.25 * size(model) - plain.activations
        plain, trimmed = (fastlur.estimate(model, batch(512), one(trim=trim)) for trim in (None, Trim()))
        assert trimmed.peak == plain.peak + size(model)
        trimmed = fastlur.LUR(trim=Trim())
        assert fastlur.estimate(model, batch(1), trimmed, forget_loss=fastlur.losses.BoundedForgetting()).other == 0

    def test_a_larger_forget_batch_counts(self):
        model = Deep()
        small, large = (fastlur.estimate(model, batch(64), forget=each) for each in (None, batch(256)))
        assert large.activations > 3.5 * small.activations
        assert large.batch == 2.5 * small.batch

    def test_what_the_exact_gradient_needs_more(self):
        model, data = Deep(), batch(256)
        modes = [fastlur.LUR(), fastlur.LUR(gradient="exact", keep_graph=False), fastlur.LUR(gradient="exact")]
        plain, anew, kept = (fastlur.estimate(model, data, method).activations for method in modes)
        assert 1.5 * plain < anew <= kept
        # the graph is held while the outer gradient is taken, and shows where that is the larger pass
        outer = batch(1024)
        plain, anew, held = (fastlur.estimate(model, data, method, forget=outer).activations for method in modes)
        assert anew == plain
        assert held > plain + 0.3 * kept

    def test_a_gradient_that_is_copied_is_there_twice_for_a_moment(self):
        """One large tensor is nearly all there is: LUR leaves its gradient where it is made, a projection cannot."""
        model = nn.Linear(32, 4000, bias=False)
        loose, flat = (fastlur.estimate(model, batch(2), name).activations for name in ("lur", "pcgrad"))
        assert loose < 0.5 * size(model)
        assert size(model) < flat < 1.5 * size(model)

    def test_passes_run_in_the_mode_of_the_method(self):
        """In eval mode dropout saves nothing."""
        model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5))
        training, judging = (fastlur.estimate(model, batch(4096), each()).activations for each in (Training, Judging))
        assert judging < 0.8 * training

    def test_both_batches_at_once_where_the_method_has_them_so(self):
        model, data = Deep(), batch(512)
        forms = [METHODS["scissorhands"](form=form, trim=None) for form in ("cleaned", "as_published")]
        apart, together = (fastlur.estimate(model, data, form) for form in forms)
        assert together.activations > 1.8 * apart.activations
        assert together.vectors == 2 * apart.vectors
        small = fastlur.estimate(model, batch(1), forms[1])
        assert small.other + small.activations == pytest.approx(8 * size(model))  # the programme on the host

    @pytest.mark.parametrize(("mode", "passes"), [("optimistic", 2), ("secant", 3), ("first_order", 2), ("exact", 3)])
    def test_a_target_is_asked_in_every_step(self, mode, passes, monkeypatch):
        """A second for whatever is timed."""
        monkeypatch.setattr("fastlur.footprint.seconds", lambda work, device: 1.0)
        monkeypatch.setattr(sys.modules["fastlur.estimate"], "_walk", lambda space: 0.0)
        for target, asked in ((BoundedForgetting(), 0), (SecondChoice(), 1)):
            found = fastlur.estimate(Deep(), batch(8), fastlur.LUR(gradient=mode), forget_loss=target)
            assert found.seconds == passes + asked

    def test_a_target_is_a_model_more(self):
        model, data = Deep(), batch(512)
        plain = fastlur.estimate(model, data, forget_loss=fastlur.losses.BoundedForgetting())
        for target in (None, fastlur.targets.Novice(), fastlur.targets.SecondChoice()):
            found = fastlur.estimate(model, data, forget_loss=target)
            assert found.other - plain.other == size(model)
            assert found.vectors == plain.vectors

    def test_lent_statistics_hold_the_activations_of_their_reference_too(self):
        """A quarter of the retain items go through the model once more in a forget pass."""
        layers = [layer for _ in range(20) for layer in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())]
        model = nn.Sequential(*layers)
        by = {by: fastlur.estimate(model, batch(4096), fastlur.LUR(normalize_by=by)) for by in ("own", "retain")}
        assert 1.15 < by["retain"].activations / by["own"].activations < 1.4
        assert by["retain"].vectors == by["own"].vectors

    def test_half_precision_halves_what_is_saved(self):
        model, data = Deep(), batch(512)
        full, half = (fastlur.estimate(model, data, precision=p).activations for p in ("fp32", "bf16"))
        assert half < 0.7 * full

    @pytest.mark.parametrize(
        ("make", "vectors"),
        [
            (lambda p: torch.optim.SGD(p, 0.1), 1),
            (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 2),
            (lambda p: torch.optim.Adam(p, 0.1), 3),
            (lambda p: torch.optim.Adagrad(p, 0.1), 2),  # made with its state
        ],
    )
    def test_an_optimizer_of_torch(self, make, vectors):
        model = Deep()
        found = fastlur.estimate(model, batch(4), optimizer=make(model.parameters())).optimizer
        assert found == pytest.approx(vectors * size(model), rel=0.01)

    def test_a_line_about_it(self):
        said = str(fastlur.estimate(Deep(), batch(64)))
        assert "MiB (parameters" in said
        assert "activations" in said
        assert "a step" in said


@pytest.mark.parametrize("name", METHODS)
def test_a_method_tells_whether_gradients_are_added_up(name, monkeypatch):
    """Where tensors are large, and nothing asks for a flat form, they stay as autograd makes them: nothing is twice."""
    added, made, collect = [], [0], space.ParameterSpace.collect

    def watched(self, out, add=False):
        added.append(out.gathered or add)
        return collect(self, out, add)

    monkeypatch.setattr(space, "LARGE", 0)
    monkeypatch.setattr(space.ParameterSpace, "collect", watched)
    note = lambda event: made.append(len(added))
    run(mlp(), blobs(16), blobs(20), method=name, steps=2, callbacks=[note])
    assert METHODS[name]().cost.adds == any(added[made[-2] if len(made) > 1 else 0 :])  # of the last step, if any


class Careful(nn.Module):
    """Batch norm, dropout, a spectral norm that iterates, a frozen layer, and parts in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 12))
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.5)
        self.frozen, self.last = nn.Linear(12, 12).requires_grad_(False), nn.Linear(12, 4)
        self.norm.eval()

    def forward(self, x):
        return self.last(self.frozen(self.drop(self.norm(self.first(x)))))


@pytest.mark.parametrize("method", [fastlur.LUR(), fastlur.LUR(gradient="exact"), METHODS["salun"]()])
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_trace_is_left(method, outside):
    model, data = Careful(), batch(8, 6, 4)
    fastlur.losses.cross_entropy(model, data).backward()
    before, places = state(model), [p.data_ptr() for p in model.parameters()]
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    with outside():
        fastlur.estimate(model, data, method, parameters="last.*")
        fastlur.estimate(model, data, method)
    drawn = torch.rand(()), np.random.rand(), random.random()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    assert drawn == (torch.rand(()), np.random.rand(), random.random())
    assert same(before, state(model))
    assert [p.data_ptr() for p in model.parameters()] == places
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    for parameter, (held, value) in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is held
        assert held is None or torch.equal(held, value)


def test_a_failure_leaves_no_trace_either():
    model = mlp()
    before, places = state(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(DataError, match="batch: the model or a loss cannot take it"):
        fastlur.estimate(model, batch(8, 7))
    assert same(before, state(model))
    assert [p.data_ptr() for p in model.parameters()] == places
    fastlur.estimate(model, batch(8, 6, 4))


@dataclasses.dataclass(frozen=True)
class Untold(fastlur.methods.Recipe):
    """A method that does not say what it costs."""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"method": Untold()}, "does not tell its cost"),
        ({"method": "lurr"}, "did you mean"),
        ({"optimizer": "sdg"}, "did you mean"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_arguments_are_refused(changed, said):
    with pytest.raises(ArgumentError, match=said):
        fastlur.estimate(mlp(), batch(8, 6, 4), **changed)


def test_models_are_refused():
    with pytest.raises(ModelError, match=r"no torch\.nn\.Module"):
        fastlur.estimate(lambda x: x, batch(8))
    with pytest.raises(ModelError, match="matches no parameter"):
        fastlur.estimate(mlp(), batch(8, 6, 4), parameters="head.*")
