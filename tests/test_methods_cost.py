"""Every method costs what `available()` says, whatever its settings: counted passes and forwards, vectors kept."""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import blobs, mlp, run
from test_methods import STEPPING, stepping

import fastlur
from fastlur import methods
from fastlur.losses import BoundedForgetting, cross_entropy
from fastlur.methods import METHODS
from fastlur.passes import Passes
from fastlur.space import ParameterSpace
from fastlur.step import Step


@dataclass(frozen=True)
class Plain(METHODS["fine_tune"]):
    cost = methods.Cost(passes=1, buffers=1)


VARIANTS = {
    "lur secant": fastlur.LUR(gradient="secant"),
    "lur first_order": fastlur.LUR(gradient="first_order", order="forget_first"),
    "lur exact": fastlur.LUR(gradient="exact"),
    "ltu secant": methods.LTU(gradient="secant", inner_lr=0.1),
    "mox npo": methods.MOX(memorise="npo", alpha=1.0),
    "mox with momentum and a target": methods.MOX(momentum=0.7, target=1),
    "scissorhands with three memories": methods.ScissorHands(memories=3),
    "gradient_ascent as published": methods.GradientAscent(bounded=False),
    "boundary_shrink alone": methods.BoundaryShrink(retain_weight=0.0),
    "boundary_expand alone": methods.BoundaryExpand(retain_weight=0.0),
    "gru alone": methods.GRU(retain_weight=0.0),
    "salun without its mask": methods.SalUn(mask=None),
    "retrain from new weights": methods.Retrain(reinitialise=True),
    "lur with a mask": fastlur.LUR(mask=methods.SaliencyMask()),
    "lur with a trim": fastlur.LUR(trim=methods.Trim()),
    "scissorhands without its trim, with a mask": methods.ScissorHands(trim=None, mask=methods.SaliencyMask()),
    "gradient_ascent with a mask beside its own": methods.GradientAscent(mask=methods.SaliencyMask(1)),
    "a method of one's own with a mask": Plain(mask=lambda passes: methods.SaliencyMask()(passes)),
}
METHODS_AND_VARIANTS = {name: METHODS[name]() for name in STEPPING} | VARIANTS


class Counter:
    """Forwards of a model, backwards of anybody's, and vectors of a space that are still held."""

    def __init__(self, monkeypatch) -> None:
        self.forwards = self.backwards = 0
        self.made: list[weakref.ref] = []
        vector, backward, grad = ParameterSpace.vector, torch.autograd.backward, torch.autograd.grad

        def recorded(space, dtype=None):
            new = vector(space, dtype)
            self.made.append(weakref.ref(new))
            return new

        def counted(*arguments, of, **keywords):
            self.backwards += 1
            return of(*arguments, **keywords)

        monkeypatch.setattr(ParameterSpace, "vector", recorded)
        monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: counted(*a, of=backward, **k))
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: counted(*a, of=grad, **k))

    def watch(self, model):
        def forwarded(*_):
            self.forwards += 1

        model.register_forward_hook(forwarded)
        return model

    def held(self, step: Step) -> float:
        """Bytes of vectors beside the optimizer's, in units of the parameters'."""
        optimizer = {id(each) for each in (step.update.first, step.update.second)}
        kept = [ref() for ref in self.made if ref() is not None and id(ref()) not in optimizer]
        return sum(f.nbytes for each in kept for f in each.flats) / sum(f.nbytes for f in step.space.theta.flats)


@pytest.fixture
def counter(monkeypatch):
    return Counter(monkeypatch)


@pytest.mark.parametrize("name", METHODS_AND_VARIANTS)
def test_a_step_costs_what_it_says(name, counter):
    """Steps that are neither the first nor the last of an epoch."""
    method, model = METHODS_AND_VARIANTS[name], mlp()
    with stepping(model, method, blobs(32), blobs(64)) as step:
        counter.watch(model)
        batches = [(blobs(8), blobs(8)) for _ in range(4)]
        step(*batches[0])
        counter.forwards = counter.backwards = 0
        for pair in batches[1:]:
            step(*pair)
        held = counter.held(step)
    cost = method.cost
    if not cost.products:  # a product is neither
        assert counter.backwards == 3 * cost.passes
        assert counter.forwards == 3 * (cost.passes + cost.forwards)
    assert held == pytest.approx(cost.buffers, abs=0.01)


@pytest.mark.parametrize("name", METHODS)
def test_the_line_about_a_method_says_it(name):
    line, cost = fastlur.methods.available()[name], METHODS[name]().cost
    (said,) = re.findall(r"([\d.]+) pass(?:es)?, ", line.rpartition(" (")[2])
    assert float(said) == cost.passes
    assert f"{cost.buffers:g} buffer" in line
    assert (f"{cost.forwards:g} forward" in line) == bool(cost.forwards)


def test_the_published_form_holds_a_model_with_its_gradients_besides(counter):
    method, model = methods.ScissorHands(form="as_published", memories=2), mlp()
    with stepping(model, method, blobs(32), blobs(64)) as step:
        for _ in range(2):
            step(blobs(8), blobs(8))
        twin = list(step.state.twin.parameters())
        assert all(p.grad is not None for p in twin)
        size = sum(p.numel() for p in twin)
        assert size == sum(p.numel() for p in model.parameters())
        assert counter.held(step) + 2 == method.cost.buffers


class TestBeforeAndAfter:
    """What the notes say."""

    def opened(self, counter, method):
        """Forwards that preparing takes, on 4 forget and 20 retain batches."""
        model = counter.watch(mlp())
        plain = {"retain": cross_entropy, "forget": BoundedForgetting()}  # no target that is trained as well
        with stepping(model, method, blobs(32), blobs(160), plain if isinstance(method, fastlur.LUR) else None):
            return counter.forwards

    def test_ltu_looks_at_sixteen_batches_with_the_model_and_six_disturbed_ones(self, counter):
        assert self.opened(counter, methods.LTU()) == 7 * 16
        assert "7 forwards over up to 16 retain batches" in str(methods.LTU().cost)

    def test_other_data_save_the_disturbed_ones(self, counter):
        method = methods.LTU(nonmembers=blobs(300))
        assert self.opened(counter, method) == 16 + 3  # of 128 items
        assert "1 forward over up to 16 retain batches and as many others" in str(method.cost)

    @pytest.mark.parametrize(("name", "passes"), [("salun", 4), ("selective_amnesia", 24), ("eupmu", 2)])
    def test_a_pass_over_the_data(self, name, passes, counter):
        assert self.opened(counter, METHODS[name]()) == passes

    @pytest.mark.parametrize("name", STEPPING)
    def test_a_trim_and_a_mask_say_so_where_there_are_any(self, name):
        bare = replace(METHODS[name](), trim=None, mask=None)
        both = replace(bare, trim=methods.Trim(), mask=methods.SaliencyMask())
        for part in ("trim", "mask"):
            assert part not in bare.cost.note
            assert f"a pass over the forget data for the {part}" in both.cost.note
            assert f"the {part}" in replace(bare, **{part: lambda passes: None}).cost.note
        assert both.cost.buffers == bare.cost.buffers + 0.25

    def test_a_trim_is_a_pass_over_the_forget_data(self, counter):
        assert self.opened(counter, fastlur.LUR(trim=methods.Trim())) == 4

    @pytest.mark.parametrize(("group", "passes"), [(1, 32 + 160), (4, 48), (None, 24)])
    def test_ssd_passes_group_by_group(self, group, passes, counter):
        assert self.opened(counter, methods.SSD(group=group)) == passes

    def test_mox_searches_with_at_most_14_forwards_over_8_batches(self, counter, monkeypatch):
        looked = []
        value = Passes.value
        monkeypatch.setattr(Passes, "value", lambda *a, **k: looked.append(1) or value(*a, **k))
        run(mlp(), blobs(16), blobs(160), method=methods.MOX(retain_limit=1e9), steps=2)
        assert len(looked) == 14 * 8
