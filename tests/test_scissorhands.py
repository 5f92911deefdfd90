"""ScissorHands against its rule written out in float64, in both forms, and what its parts do alone."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from helpers import Interrupted, blobs, interrupt, mlp, run, same, state
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.data import Feed, Stream, source
from fastlur.losses import cross_entropy, negative_cross_entropy
from fastlur.methods import METHODS
from fastlur.methods.repair import Repair, solve
from fastlur.step import Step
from fastlur.world import derive

ScissorHands = METHODS["scissorhands"]
FORMS = ("cleaned", "as_published")


def bounded_programme(gram, dots):
    """argmin_{v ≥ ½} ½ vᵀ(G + 10⁻³I)v + dᵀv by trying every set of active bounds."""
    p, best = gram + 1e-3 * np.eye(len(dots)), (np.inf, None)
    for free in itertools.product([False, True], repeat=len(dots)):
        inside, v = np.array(free), np.full(len(dots), 0.5)
        if inside.any():
            right = -dots[inside] - p[np.ix_(inside, ~inside)] @ v[~inside]
            v[inside] = np.linalg.solve(p[np.ix_(inside, inside)], right)
        value = 0.5 * v @ p @ v + dots @ v
        if (v >= 0.5 - 1e-12).all() and value < best[0]:
            best = value, v
    return best[1]


def data(retain=40, forget=16):
    """One rule behind all labels, so that what unlearns one side unlearns the other: gradients are in conflict."""
    rule = torch.randn(6, 4, dtype=torch.float64)
    inputs = [torch.randn(n, 6, dtype=torch.float64) for n in (forget, retain)]
    return [(x, (x @ rule).argmax(-1)) for x in inputs]


def oracle(model, forget, retain, *, steps, weight, count, chosen, every, lr, size=8, seed=0):
    """θ after plain SGD along the repaired gradients, and how many of them were repaired."""
    feed = Feed({"forget": source(forget, "forget", size)}, seed, torch.device("cpu"))
    streams = [Stream(source(d, "x", size), derive(seed, side)) for d, side in ((forget, "forget"), (retain, "retain"))]
    mask = torch.cat([torch.full((p.numel(),), chosen(name)) for name, p in model.named_parameters()]).double()
    length = -(-len(retain[1]) // size)
    conflicts = 0

    def gradient(of, batch):
        grads = torch.autograd.grad(functional.cross_entropy(of(batch[0]), batch[1]), list(of.parameters()))
        return torch.cat([g.reshape(-1) for g in grads])

    for step in range(steps):
        f, r = next(streams[0]), next(streams[1])
        if step % length == 0:
            frozen = copy.deepcopy(model).eval()
            drawn = feed.batches("forget", count, draw=("memory", step // length))
            memories = torch.stack([-mask * gradient(frozen, batch) for batch in drawn])
        model.train()
        g = gradient(model, r)
        if step % length < -(-len(forget[1]) // size):
            if step >= length:
                f = feed.epoch("forget", ("repair", step // length))(step % length)
            g = g - weight * gradient(model, f)
            dots = memories @ g
            if step % length % every == 0 and (dots < 0).any():
                v = bounded_programme((memories @ memories.T).numpy(), dots.numpy())
                g, conflicts = g + memories.T @ torch.from_numpy(v), conflicts + 1
        with torch.no_grad():
            for p, part in zip(model.parameters(), g.split([p.numel() for p in model.parameters()]), strict=True):
                p -= lr * part.view_as(p)
    return model, conflicts


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("count", "layers", "every"), [(1, None, 1), (2, "3.*", 1), (1, "3.*", 2), (2, None, 1)])
def test_the_steps_are_those_of_the_rule(form, count, layers, every):
    torch.manual_seed(1)
    model, (forget, retain) = mlp(dtype=torch.float64), data()
    wanted, conflicts = oracle(
        copy.deepcopy(model),
        forget,
        retain,
        steps=11,
        weight=0.4,
        count=count,
        chosen=lambda name: layers is None or name.startswith("3"),
        every=every,
        lr=0.3,
    )
    method = ScissorHands(0.4, count, layers, every, form, trim=None)
    options = {"steps": 11, "lr": 0.3, "momentum": 0.0, "schedule": "constant", "forget_loss": negative_cross_entropy}
    run(model, forget, retain, method=method, **options)
    assert conflicts > 0
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_that_breaks_names_the_forget_batch_that_the_epoch_drew(form, loader):
    """Step 7 is the second of the second epoch, whose forget batches are not the run's own."""
    model, (forget, retain) = mlp(dtype=torch.float64), data()
    broken, taken = [], []

    def breaks(m, batch):
        value = negative_cross_entropy(m, batch)
        if not broken:
            return value
        taken.append(batch[0].clone())
        return value * float("nan")

    given = DataLoader(TensorDataset(*forget), 8, shuffle=True) if loader else forget
    method = ScissorHands(form=form, trim=None)
    callback = lambda event: broken.append(1) and None if event.step == 6 else None
    with pytest.raises(fastlur.NonFiniteError) as found:
        run(model, given, retain, method=method, steps=9, forget_loss=breaks, callbacks=[callback])
    assert found.value.step == 7 and found.value.sides == ("forget",)
    assert all(torch.equal(each, taken[0]) for each in taken)  # looked for on the batch that broke
    if loader:
        assert "forget batch: number 2 of an epoch of its own" in str(found.value)
    else:
        items = [next(i for i, x in enumerate(forget[0]) if torch.equal(x, row)) for row in taken[0]]
        assert f"forget batch: items {', '.join(map(str, items))};" in str(found.value)


@pytest.mark.parametrize("loader", [False, True])
def test_a_batch_that_was_not_the_runs_own_is_found_again(loader):
    forget = data()[0]
    given = DataLoader(TensorDataset(*forget), 8, shuffle=True) if loader else forget
    feed = Feed({"forget": source(given, "forget", 8)}, 0, torch.device("cpu"))
    batch = feed.epoch("forget", ("repair", 3))(1)
    for step in range(1, 101):
        feed.instead("forget", step, ("repair", 3), 1)
    assert torch.equal(feed.of_step("forget", 100)[0], batch[0])
    assert torch.equal(feed.of_step("forget", 69)[0], batch[0])  # what may still be asked for
    assert not torch.equal(feed.of_step("forget", 1)[0], batch[0])  # too long ago to be held


@pytest.mark.parametrize("count", [1, 3])
def test_both_forms_go_the_same_way_with_dropout_batch_norm_and_a_tie(count):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
            self.again = nn.Linear(6, 6)
            self.again.weight = self.first.weight

        def forward(self, x):
            x = functional.dropout(torch.tanh(self.norm(self.first(x))), 0.2, self.training)
            return self.last(torch.tanh(self.again(x)))

    one = Tied().double()
    two, (forget, retain) = copy.deepcopy(one), data()
    for model, form in zip((one, two), FORMS, strict=True):
        run(model, forget, retain, method=ScissorHands(0.3, count, form=form), steps=9, lr=0.05)
    for name, value in state(one).items():
        torch.testing.assert_close(value, state(two)[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_programme_is_solved(count):
    random = np.random.default_rng(count)
    for scale in (1e-3, 1.0, 30.0):
        memories = scale * random.normal(size=(count, 7))
        dots = scale * memories @ random.normal(size=7)
        wanted = bounded_programme(memories @ memories.T, dots)
        np.testing.assert_allclose(solve(memories @ memories.T, dots), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("size", [1e4, 1e7, 1e9])
@pytest.mark.parametrize("apart", [0.0, 1e-9, 1e-3])
def test_memories_that_are_nearly_one_large_one_are_solved_for(count, size, apart):
    """The correction of the gradient is unique, v is not; it undoes the conflict as far as one memory would."""
    random = np.random.default_rng(count)
    memories = size * (random.normal(size=7) + apart * random.normal(size=(count, 7)))
    g = random.normal(size=7) - 3 * count * memories.mean(0)
    dots = memories @ g
    v = solve(memories @ memories.T, dots)
    assert np.isfinite(v).all() and (v >= 0.5).all()
    mean = memories.mean(0)
    wanted = max(0.5 * count, -(mean @ g) / (mean @ mean))
    if apart < 1e-3:
        np.testing.assert_allclose(v.sum(), wanted, rtol=1e-5)
        np.testing.assert_allclose(memories.T @ v, wanted * mean, rtol=1e-5)


def test_where_the_first_solver_finds_no_end_another_does(monkeypatch):
    solved = scipy.optimize.lsq_linear

    def stuck(*arguments, method, **options):
        found = solved(*arguments, method=method, **options)
        if method == "bvls":
            found.success, found.x = False, np.full_like(found.x, 1e6)
        return found

    monkeypatch.setattr(scipy.optimize, "lsq_linear", stuck)
    memories = np.random.default_rng(0).normal(size=(3, 7))
    dots = memories @ np.random.default_rng(1).normal(size=7)
    wanted = bounded_programme(memories @ memories.T, dots)
    np.testing.assert_allclose(solve(memories @ memories.T, dots), wanted, rtol=1e-4)


class TestEpochs:
    def opened(self, method, forget, retain, **options):
        sources = {"forget": source(forget, "forget", 8), "retain": source(retain, "retain", 8)}
        losses = {"retain": cross_entropy, "forget": negative_cross_entropy}
        model = mlp()
        return Step(model, method, losses, feed=Feed(sources, 0, torch.device("cpu")), steps=20, **options)

    def test_anchors_come_once_an_epoch_and_forget_data_are_used_once_in_it(self, monkeypatch):
        done = []
        for part in ("anchor", "joint_gradient", "retain_gradient", "project"):
            whole = getattr(Repair, part)
            monkeypatch.setattr(Repair, part, lambda self, part=part, whole=whole: (done.append(part), whole(self)))
        with self.opened(ScissorHands(trim=None), blobs(16), blobs(32)) as step:
            for _ in range(8):
                step(blobs(8), blobs(8))
        epoch = ["anchor", *["joint_gradient", "project"] * 2, *["retain_gradient"] * 2]
        assert done == epoch * 2

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("count", [1, 2])
    def test_a_run_interrupted_within_an_epoch_goes_on_with_its_memories(self, form, count, tmp_path):
        model, (forget, retain) = mlp(dtype=torch.float64), data(48, 32)
        twin, first = copy.deepcopy(model), copy.deepcopy(model)
        options = {"method": ScissorHands(0.4, count, form=form, trim=None), "steps": 6, "lr": 0.3}
        saving = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
        run(twin, forget, retain, **options)
        with pytest.raises(Interrupted):
            run(first, forget, retain, callbacks=[interrupt], **options, **saving)
        run(model, forget, retain, **options, **saving)
        assert same(state(model), state(twin))

    @pytest.mark.parametrize("kind", ["tensors", "loader"])
    @pytest.mark.parametrize("form", FORMS)
    def test_every_epoch_takes_every_forget_item_resumed_or_not(self, kind, form, tmp_path):
        """5 retain batches and 3 forget batches of 8, the last of which is not full."""
        forget, retain = data(40, 21)
        names = {tuple(x.tolist()): number for number, x in enumerate(forget[0])}
        noted = Notes()

        def forgetting(model, batch):
            if model.training:
                noted._epochs[-1].update(names[tuple(x.tolist())] for x in batch[0])
            return negative_cross_entropy(model, batch)

        def given():
            if kind == "tensors":
                return forget
            return DataLoader(TensorDataset(*forget), 8, shuffle=True, generator=torch.Generator())

        model = mlp(dtype=torch.float64)
        twin, first = copy.deepcopy(model), copy.deepcopy(model)
        options = {"method": ScissorHands(0.4, form=form, trim=None), "steps": 15, "lr": 0.01}
        options |= {"forget_loss": forgetting}
        new_epoch = lambda event: noted._epochs.append(set()) if event.step % 5 == 0 else None
        noted._epochs.append(set())
        run(twin, given(), retain, callbacks=[new_epoch], **options)
        assert [len(each) for each in noted._epochs] == [21, 21, 21, 0]

        def broken(event):
            if event.step == 7:
                raise Interrupted

        saving = {"checkpoint": tmp_path / "run", "checkpoint_every": 1}
        with pytest.raises(Interrupted):
            run(first, given(), retain, callbacks=[broken], **options, **saving)
        run(model, given(), retain, **options, **saving)
        assert same(state(model), state(twin))

    def test_a_part_can_be_run_alone(self):
        forget, retain = blobs(16), blobs(32)
        with self.opened(ScissorHands(trim=None), forget, retain) as step:
            before = state(step.space.model)
            with step.passes.of_step(1, forget, retain):
                step.state.anchor()
                step.state.joint_gradient()
                g = step.state.gradient.flats[0].clone()
                step.state.retain_gradient()
                step.state.project()
            assert same(before, state(step.space.model))
            assert not torch.equal(g, step.state.gradient.flats[0])

    def test_memories_are_of_the_chosen_layers_only(self):
        with self.opened(ScissorHands(trim=None, layers="3.*"), blobs(16), blobs(32)) as step:
            step(blobs(8), blobs(8))
            (memory,) = step.state.memories
            touched = {n for n, v in zip(step.space.names, memory.views, strict=True) if bool(v.any())}
        assert touched == {"3.weight", "3.bias"}

    def test_data_that_do_not_tell_their_length_are_one_epoch(self):
        class Endless:
            def __iter__(self):
                yield from [blobs(8), blobs(8), blobs(8)]

        model = mlp()
        result = run(model, Endless(), Endless(), method=ScissorHands(), steps=7, allow_overlap=True)
        assert len(result.history["step"]) == 7


def test_the_presets_are_the_published_settings():
    for name, (lr, sparsity, weight, every) in {
        "cifar10_random10": (5e-3, 0.97, 0.05, 1),
        "cifar10_random50": (1e-3, 0.97, 0.01, 10),
        "cifar100_random10": (5e-3, 0.99, 1.0, 1),
        "svhn": (1e-3, 0.9, 0.01, 1),
    }.items():
        found = fastlur.methods.preset("scissorhands", name)
        method = found.pop("method")
        assert found.pop("forget_loss") is negative_cross_entropy
        assert found == {"lr": lr, "epochs": 10, "momentum": 0.9, "weight_decay": 5e-4}
        assert (method.trim.sparsity, method.forget_weight, method.project_every) == (sparsity, weight, every)
        assert method.layers == method.trim.layers == ("layer3.*", "layer4.*", "fc.*")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"forget_weight": -1}, "forget_weight=-1"),
        ({"memories": 0}, "memories=0"),
        ({"memories": None}, "memories=None"),
        ({"project_every": 1.5}, "project_every=1.5"),
        ({"form": "fast"}, "form='fast'"),
    ],
)
def test_values_out_of_range_are_refused_by_name(settings, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        ScissorHands(**settings)


class Notes:
    """What a loss writes down, under a private name, which resuming does not compare."""

    def __init__(self):
        self._epochs = []


class Indexed(nn.Module):
    """Scores read from a table at places that a buffer holds, as a transformer's relative positions are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        self.register_buffer("places", torch.tensor([4, 0, 3, 3, 1, 2]))

    def forward(self, x):
        return x @ self.table[self.places]


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_may_hold_buffers(form):
    torch.manual_seed(0)
    model, places = Indexed(), torch.tensor([4, 0, 3, 3, 1, 2])
    before = model.table.detach().clone()
    run(model, *data(), method=ScissorHands(form=form), steps=3)
    assert torch.equal(model.places, places) and not torch.equal(model.table, before)
