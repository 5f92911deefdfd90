"""Where two gradients lead, whatever the losses they come from: linear ones, whose gradients are chosen."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import Interrupted, Point, blobs, interrupt, mlp, run, same, state
from test_methods import stepping

import fastlur
from fastlur import methods

F64 = torch.float64
A, B = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=F64), torch.tensor([-1.0, 2.0, 0.5, 1.0], dtype=F64)

CASES = {
    "in conflict": (A, B),
    "in agreement": (A, -B),
    "at right angles": (torch.tensor([1.0, 0, 0, 0], dtype=F64), torch.tensor([0.0, 2, 0, 0], dtype=F64)),
    "the same": (A, A),
    "exactly opposite": (A, -A),
    "opposite, the other longer": (A, -9 * A),
    "nothing to retain": (torch.zeros(4, dtype=F64), B),
    "nothing to forget": (A, torch.zeros(4, dtype=F64)),
    "nothing": (torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64)),
}


def without(f, r):
    """f less its component against r, if it has one."""
    return f - (f @ r) / (r @ r) * r if f @ r < 0 else f


def repaired(g, m):
    """ScissorHands with one memory, by the programme's closed form."""
    return g + max(0.5, float(-(g @ m) / (m @ m + 1e-3))) * m if g @ m < 0 else g


RULES = {
    "neggrad_plus": (methods.NegGradPlus(0.6), lambda r, f: 0.6 * r + 0.4 * f),
    "pcgrad": (methods.PCGrad(0.5), lambda r, f: without(r, f / 2) + without(f / 2, r)),
    "gru": (methods.GRU(0.5, retain_weight=2.0), lambda r, f: 2 * r + without(f / 2, r)),
    "gru alone": (methods.GRU(0.5, retain_weight=0.0), lambda r, f: without(f / 2, r)),
    "lur": (fastlur.LUR(forget_weight=0.5), lambda r, f: r + 0.5 * f),  # what is straight cannot be aligned
    "gradient_ascent": (methods.GradientAscent(bounded=False), lambda r, f: f),
    "scissorhands": (methods.ScissorHands(0.5, trim=None), lambda r, f: repaired(r + 0.5 * f, f)),
    "selective_amnesia": (methods.SelectiveAmnesia(0.7), lambda r, f: 0.7 * r + f),  # at its centre
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
def test_the_first_step_with_any_two_losses(name, case):
    (method, rule), (r, f) = RULES[name], CASES[case]
    model = Point(torch.zeros(4, dtype=F64))
    losses = {"loss": lambda m, batch: m() @ r, "forget_loss": lambda m, batch: m() @ f}
    options = {"steps": 1, "lr": 1.0, "momentum": 0.0, "schedule": "constant", "max_grad_norm": math.inf}
    options["progress"] = False
    fastlur.unlearn(model, blobs(4), blobs(4), method=method, **losses, **options)
    assert bool(torch.isfinite(model.x).all())
    torch.testing.assert_close(-model.x.detach(), rule(r, f), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ["retain_first", "forget_first"])
def test_each_half_of_the_meta_gradient_is_recorded_on_its_own_side(order):
    model, (r, f) = Point(torch.zeros(4, dtype=F64)), CASES["in conflict"]
    losses = {"loss": lambda m, batch: m() @ r, "forget_loss": lambda m, batch: m() @ f}
    result = run(model, blobs(4), blobs(4), method=fastlur.LUR(forget_weight=0.5, order=order), steps=1, **losses)
    assert result.history["retain_norm"][0] == pytest.approx(float(r.norm()))
    assert result.history["forget_norm"][0] == pytest.approx(float(f.norm()) / 2)


def test_a_climb_that_has_ended_does_not_begin_again():
    """Whatever the losses of later batches: 0.3 above the first is too much, and 0.4 below it comes too late."""
    going = []
    with stepping(mlp(), methods.GradientAscent(max_rise=0.2), blobs(8), blobs(8)) as step:
        for loss in (1.0, 1.19, 0.5, 1.3, 0.6, 1.0):
            step.state.look(torch.tensor(loss), 0.2)
            going.append(all(bool(flat.all()) for flat in step.state.free.flats))
    assert going == [True, True, True, False, False, False]


def test_a_climb_that_was_interrupted_still_knows_where_it_began(tmp_path):
    model, data = mlp(dtype=F64), blobs(8, dtype=F64)
    twin, first = copy.deepcopy(model), copy.deepcopy(model)
    options = {"method": methods.GradientAscent(max_norm=10.0, max_rise=0.3), "steps": 20, "lr": 0.02}
    options |= {"forget_loss": fastlur.losses.negative_cross_entropy, "allow_overlap": True}
    saving = {"checkpoint": tmp_path, "checkpoint_every": 1}
    losses, again = [], (data[0], data[1])
    run(twin, data, again, callbacks=[lambda event: losses.append(float(event.stats.retain_loss))], **options)
    assert losses[2] < losses[0] + 0.3 < losses[-1]
    with pytest.raises(Interrupted):
        run(first, data, again, callbacks=[interrupt], **options, **saving)
    run(model, data, again, **options, **saving)
    assert same(state(model), state(twin))
