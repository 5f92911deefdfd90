"""What a caller brings of their own, and a resumed run meets again: targets, modules, loaders that keep workers."""

from __future__ import annotations

import pytest
import torch
from checkpoints import break_off, go_on, job, whole
from helpers import Noting, blobs, mlp, same, state

import fastlur
from fastlur.batches import Batches
from fastlur.losses import BoundedForgetting
from fastlur.stopping import Reached
from fastlur.targets import Imitation, SecondChoice


class Half(SecondChoice):
    """A target of one's own."""

    def prepare(self, passes):
        made = super().prepare(passes)
        return lambda model, batch: made(model, batch) / 2


class Bounded(SecondChoice):
    """One that is an ascent, with a bound of its own."""

    def prepare(self, passes):
        return BoundedForgetting(0.5)


class Elsewhere(SecondChoice):
    """One that imitates another network."""

    def prepare(self, passes):
        teacher = mlp(dropout=0.3)
        teacher[1] = torch.nn.ReLU()
        return Imitation(teacher)


@pytest.mark.parametrize("target", [Half(), Bounded(), Elsewhere()], ids=lambda target: type(target).__name__)
def test_a_target_of_ones_own_is_made_again(target, tmp_path):
    model, data, options = job(tmp_path, forget_loss=target)
    expected = whole(model, data, options)
    break_off(model, data, options)
    assert same(state(go_on(model, data, options)[0]), state(expected))


def test_a_setting_that_a_module_of_ones_own_holds_is_compared(tmp_path):
    first = Noting(0.1)
    _, data, options = job(tmp_path)
    break_off(first, data, options)
    other = Noting(0.9)
    other.load_state_dict(first.state_dict())
    said = r"settings of the model was {'p': '0.1'}, now {'p': '0.9'}"
    with pytest.raises(fastlur.CheckpointError, match=said):
        fastlur.unlearn(other, *data, **options)
    other.noted = 5.0  # which only one of them has, and which is named no more than it is minded
    with pytest.raises(fastlur.CheckpointError, match=said):
        fastlur.unlearn(other, *data, **options)
    other.p = 0.1
    assert fastlur.unlearn(other, *data, **options).ended == "all steps done"


def test_what_a_forward_notes_is_no_setting(tmp_path):
    first = Noting()
    _, data, options = job(tmp_path)
    break_off(first, data, options)
    first.seconds = 5.0
    assert fastlur.unlearn(first, *data, **options).ended == "all steps done"


class Drawing(torch.utils.data.Dataset):
    """Items with something drawn for them in the worker that loads them."""

    def __init__(self, count):
        self.x, self.y = blobs(count)[0], torch.arange(count) % 4

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]


def test_workers_that_a_loader_keeps_are_no_difference(tmp_path):
    """Such a loader has one iterator: whoever else goes over it would send the run back to its beginning."""
    model, _, options = job(tmp_path)
    kept = {"batch_size": 4, "shuffle": True, "num_workers": 1, "persistent_workers": True}
    data = [torch.utils.data.DataLoader(Drawing(count), **kept) for count in (12, 20)]
    rule = Reached(lambda model: float(len(list(data[0]))), at_most=0.0, every=2)
    options |= {"stop": rule, "steps": 7, "forget_loss": BoundedForgetting()}
    expected = whole(model, data, options)
    break_off(model, data, options)
    assert same(state(go_on(model, data, options)[0]), state(expected))
    stream, seen = Batches(data[0]).stream(0, 0), []
    for _ in range(3):
        seen += next(stream)[1].tolist()
        list(data[0])
    assert sorted(seen) == sorted(data[0].dataset.y.tolist())


def test_so_it_is_where_one_loader_wraps_another():
    class Wrapping(torch.utils.data.DataLoader):
        def __iter__(self):
            return iter(self.base_dataloader)

    kept = {"batch_size": 4, "num_workers": 1, "persistent_workers": True}
    outer = Wrapping(Drawing(12), **kept)
    vars(outer)["base_dataloader"] = torch.utils.data.DataLoader(Drawing(12), **kept)
    stream, seen = Batches(outer).stream(0, 0), []
    for _ in range(3):
        seen += next(stream)[1].tolist()
        list(outer)
    assert sorted(seen) == sorted(outer.dataset.y.tolist())
