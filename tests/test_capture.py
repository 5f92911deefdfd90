"""A captured step: what is replayed and when. Without a GPU a recorder of calls stands in for the graph."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from helpers import blobs, mlp, same, state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import fastlur
from fastlur import capture, placement, step

CUDA = torch.cuda.is_available()


class Recorder(TorchDispatchMode):
    """What a graph is: the calls below autograd, on the memory they were made on; nothing of Python comes back."""

    def __init__(self):
        super().__init__()
        self.calls, self.met, self.before = [], set(), []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        for tensor in found_in((args, kwargs)):
            if self.meets(tensor):
                self.before.append((tensor.untyped_storage(), tensor.untyped_storage().clone()))
        made = call(*args, **kwargs)
        for tensor in found_in(made):
            self.meets(tensor)
        self.calls.append((call, args, kwargs, tree_map_only(torch.Tensor, torch.Tensor.detach, made)))
        return made

    def meets(self, tensor):
        new = place(tensor) not in self.met
        self.met.add(place(tensor))
        return new

    def undo(self):
        """To record is not to do."""
        for storage, before in self.before:
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for call, args, kwargs, made in self.calls:
            again = call(*args, **kwargs)
            given = {place(tensor) for tensor in found_in((args, kwargs))}
            for old, new in zip(found_in(made), found_in(again), strict=True):
                if place(old) not in given:
                    old.copy_(new)


def found_in(nested):
    return [leaf for leaf in tree_flatten(nested)[0] if isinstance(leaf, torch.Tensor)]


def place(tensor):
    return tensor.untyped_storage()._cdata


def record_calls(work):
    with Recorder() as recorder:
        work()
    recorder.undo()
    return recorder.replay


@pytest.fixture
def recorded(monkeypatch):
    """How often something was recorded and replayed; where there is no GPU the graph is a `Recorder`."""
    counts = {"recorded": 0, "replayed": 0}
    whole = capture.record if CUDA else record_calls

    def record(work):
        counts["recorded"] += 1
        replay = whole(work)

        def counted():
            counts["replayed"] += 1
            replay()

        return counted

    monkeypatch.setattr(capture, "record", record)
    if not CUDA:
        monkeypatch.setattr(step, "check_capture", lambda *_: None)
        monkeypatch.setattr("fastlur.reach.on_host", lambda _: False)  # as on a device, whose numbers stay there
    return counts


def moved(model, batches, **options):
    device = "cuda" if CUDA else "cpu"
    model = copy.deepcopy(model).to(device)
    losses = []
    with fastlur.MetaStep(model, lr=0.1, **options) as metastep:
        for forget, retain in batches:
            losses.append(metastep(forget, retain).retain_loss)
    return model, losses


@pytest.mark.parametrize("gradient", ["optimistic", "secant", "exact", "first_order"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_captured_run_is_the_run(gradient, optimizer, recorded):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), mlp())
    batches = [(blobs(8), blobs(8)) for _ in range(6)]
    batches.insert(4, (blobs(5), blobs(8)))  # another shape, in the middle
    found = [moved(model, batches, gradient=gradient, optimizer=optimizer, capture=c) for c in (False, True)]
    assert recorded == {"recorded": 1, "replayed": 3}
    assert same(*(state(model) for model, _ in found))
    assert [float(x) for x in found[0][1]] == [float(x) for x in found[1][1]]  # each its own tensor


def test_batches_of_any_form_are_found_and_copied():
    a, b, c = (torch.zeros(n) for n in (1, 2, 3))
    batch = {"x": [a, (b, "text")], "y": c}
    assert [t.numel() for t in placement.tensors(batch)] == [1, 2, 3]
    again = capture.cloned(batch)
    assert again["x"][1][1] == "text"
    assert all(x is not y for x, y in zip(placement.tensors(batch), placement.tensors(again), strict=True))


@pytest.mark.parametrize("gradient", ["optimistic", "exact"])
def test_going_back_by_load_state_dict_is_to_begin_again(gradient, recorded):
    """Also for what stands outside tensors: that no gradient was kept yet; and for the bound of the weights."""
    torch.manual_seed(0)
    model = mlp().to("cuda" if CUDA else "cpu")
    batches = [(blobs(8), blobs(8)) for _ in range(6)]
    with fastlur.MetaStep(model, lr=0.1, inner_lr=0.3, gradient=gradient, capture=True) as metastep:
        bare, weights, ends, losses = metastep.state_dict(), state(model), [], []
        for _ in range(2):
            metastep.load_state_dict(bare)
            model.load_state_dict(weights)  # in either order
            losses.append([float(metastep(*each).retain_loss) for each in batches])
            ends.append(state(model))
    assert losses[0] == losses[1]
    assert same(*ends)
    assert recorded == {"recorded": 2, "replayed": 6}


def test_the_bound_is_kept_where_a_graph_writes_to_it_and_looks_anew(recorded):
    model = mlp().to("cuda" if CUDA else "cpu")
    with fastlur.MetaStep(model, lr=0.0, capture=True) as metastep:
        bare = metastep.state_dict()
        for _ in range(5):
            metastep(blobs(8), blobs(8))
        reach, place = metastep.update._reach, metastep.update._reach._largest.data_ptr()
        metastep.load_state_dict(bare)
        with torch.no_grad():
            model[0].weight[0, 0] = 1e9
        metastep(blobs(8), blobs(8))
        assert metastep.update._reach is reach
        assert reach._largest.data_ptr() == place
        assert float(reach._largest.max()) >= 1e9


@pytest.mark.parametrize("place", ["tuple", "dict"])
def test_what_is_no_tensor_is_looked_at_in_every_step(place, recorded):
    def loss(model, batch):
        x, y, (factor, *_) = batch.values() if isinstance(batch, dict) else batch
        return factor * torch.nn.functional.cross_entropy(model(x), y)

    torch.manual_seed(0)
    model, factors, made = mlp(), [1.0, 1.0, 1.0, 2.0, 0.5, 2.0, True, 2.0], []
    for factor in factors:
        batch = (*blobs(8), (factor, "text"))
        made.append(dict(zip("xyz", batch, strict=True)) if place == "dict" else batch)
    found = [
        moved(model, [(each, each) for each in made], loss=loss, forget_loss=loss, capture=c) for c in (False, True)
    ]
    assert recorded == {"recorded": 1, "replayed": 3}  # of the fourth step, and where the factor is the same again
    assert same(*(state(model) for model, _ in found))
    assert [float(x) for x in found[0][1]] == [float(x) for x in found[1][1]]


class Held:
    """A batch that nobody can look into."""

    def __init__(self, n):
        self.held = blobs(n)


def test_what_cannot_be_looked_into_is_never_recorded(recorded):
    def loss(model, batch):
        x, y = (t.to(next(model.parameters()).device) for t in batch.held)
        return torch.nn.functional.cross_entropy(model(x), y)

    batch, seen = Held(8), []
    with fastlur.MetaStep(mlp(), loss, loss, lr=0.0, capture=True) as metastep:
        for _ in range(6):
            batch.held = blobs(8)
            seen.append(float(metastep(batch, batch).retain_loss))
    assert recorded == {"recorded": 0, "replayed": 0}
    assert len(set(seen)) == 6


def test_the_form_of_a_batch():
    x = torch.zeros(2)
    one = capture.form({"x": x, "n": 1})
    assert one == capture.form({"x": torch.ones(2), "n": 1})
    for other in ({"x": x, "n": 2}, {"x": x, "n": 1.0}, {"x": x, "n": True}, {"x": x}, {"y": x, "n": 1}, [x, 1]):
        assert capture.form(other) != one
    assert capture.form((x,)) != capture.form([x])
    assert capture.form((x, 0.0)) != capture.form((x, -0.0))
    assert capture.form((x, {"a": [object()]})) is None


DRAWS = {"torch": lambda: torch.rand(()), "numpy": np.random.rand, "python": random.random}


def drawing(how):
    """A loss that draws by itself."""

    def loss(model, batch):
        value = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        return value + 0 * float(DRAWS[how]())

    return loss


@pytest.mark.parametrize("how", ["dropout", "torch", "numpy", "python"])
@pytest.mark.parametrize("side", ["loss", "forget_loss"])
@pytest.mark.parametrize("gradient", ["optimistic", "exact"])
def test_passes_that_draw_are_refused_whatever_the_caller_drew(how, side, gradient, recorded):
    if how == "dropout":
        model, losses = mlp(dropout=0.5), {}
    else:
        model, losses = mlp(), {side: drawing(how)}
    model = model.to("cuda" if CUDA else "cpu")
    with fastlur.MetaStep(model, gradient=gradient, capture=True, **losses) as metastep:
        for _ in range(3):
            torch.manual_seed(0)
            metastep(blobs(8), blobs(8))
        before = state(model)
        for _ in range(2):
            with pytest.raises(fastlur.ModelError, match="random numbers"):
                metastep(blobs(8), blobs(8))
        assert same(state(model), before)
    assert recorded["recorded"] == 0


@pytest.mark.parametrize("options", [{}, {"gradient": "exact"}, {"gradient": "exact", "hessian": "func"}])
def test_passes_that_do_not_draw_are_taken_whatever_the_caller_drew(options, recorded):
    with fastlur.MetaStep(mlp(dropout=0.0).to("cuda" if CUDA else "cpu"), capture=True, **options) as metastep:
        for _ in range(5):
            torch.rand(1, device=metastep.space.device)
            np.random.rand()
            random.random()
            metastep(blobs(8), blobs(8))
    assert recorded == {"recorded": 1, "replayed": 2}


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_it_is_refused_and_the_model_is_free_again():
    model = mlp()
    with pytest.raises(fastlur.ArgumentError, match="capture=True: needs a CUDA device"):
        fastlur.MetaStep(model, capture=True)
    fastlur.MetaStep(model).close()


@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_an_optimizer_that_decides_on_the_host_is_refused():
    model = mlp().cuda()
    with pytest.raises(fastlur.ArgumentError, match="capture=True: needs 'sgd'"):
        fastlur.MetaStep(model, optimizer=torch.optim.SGD(model.parameters()), capture=True)
