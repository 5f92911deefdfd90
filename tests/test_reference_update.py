"""meta_update by the plain-torch backend, against float64 written out in truth.py."""

from __future__ import annotations

import pytest
import torch
import truth
from truth import CASE_IDS, CASES, DTYPES, Kept, double, draw, lay, within

from fastlur import backends, ops, reference
from fastlur.operands import hyper_parameters

rules = pytest.mark.parametrize("rule", ["sgd", "adamw"])
# powers of these betas, and 1 minus them, are exact: no rounding in the bias correction, which would magnify it
NUMBERS = {"lr": 0.1, "beta1": 0.75, "beta2": 0.625, "eps": 1e-3, "decay": 0.5, "l1": 0.25, "prox": 0.75}
# Roundings in a row. Direction: 6 (a difference, prox, its product, F, two sums). SGD: one more for m, for θ also lr,
# a product and a difference. AdamW: three more for m; for v twice the direction's and 4; for θ those of m, 2 for the
# correction, a quotient, lr, a product, a difference, 3 for the root, ε and their sum, and half of v's and its 2.
ROUNDINGS = {"sgd": (10, 7), "adamw": (18, 9, 16)}
PARTS = {"plain": 0, "both halves": 1, "anchored": 2, "weighted": 3, "masked": 4}


@pytest.fixture(autouse=True)
def _plain():
    with backends.backend("torch"):
        yield


def packed(numbers):
    names = {"lr": "lr", "momentum": "beta1", "beta2": "beta2", "eps": "eps", "weight_decay": "decay"}
    names |= {"l1": "l1", "prox": "prox"}
    return hyper_parameters("cpu", **{theirs: numbers[ours] for theirs, ours in names.items()})


def state(ok=1.0, count=3.0, scale=0.375):
    return torch.tensor([ok, count, scale], dtype=torch.float64)


def operands(rule, sizes, layout, dtype, parts="masked"):
    """θ, a, u, m, v, θ₀, F and mask, in the order of `meta_update`; `parts` tells how many of the others are there."""
    lists = [draw(sizes, layout, dtype, which) for which in range(7)]
    for x in (*lists[4], *lists[6]):
        x.abs_().clamp_(min=0.5)  # second moments from which a root keeps its digits
    number = PARTS[parts]
    mask = [lay(torch.rand(x.shape) > 0.3, "guarded" if layout == "guarded" else "sliced") for x in lists[0]]
    have = [True, True, number > 0, True, rule == "adamw", number > 1, number > 2]
    return [each if there else None for each, there in zip(lists, have, strict=True)] + [mask if number > 3 else None]


def step(lists, control, hyper):
    theta, a, u, first, second, theta0, fisher, mask = lists
    ops.meta_update(
        theta, a, u, first, second, control=control, hyper=hyper, theta0=theta0, fisher=fisher, mask=mask
    )  # fmt: skip


def check(rule, lists, control=None, **changed):
    numbers, control = NUMBERS | changed, state() if control is None else control
    hyper = packed(numbers)
    kept = Kept([control, hyper], *(lists[i] for i in (1, 2, 5, 6, 7)))
    wide = [double(each) for each in lists[:7]] + [lists[7] or [None] * len(lists[0])]
    places = zip(*wide, strict=False)
    numbers |= {"scale": float(control[2]), "count": float(control[1])}
    expected = [truth.update(*place, **numbers) for place in places]
    step(lists, control, hyper)
    written = [lists[0], lists[3], lists[4]]
    for which, roundings in enumerate(ROUNDINGS[rule]):
        within(written[which], [place[which] for place in expected], roundings)
    kept.check()


@pytest.mark.parametrize(("sizes", "layout", "dtype"), CASES, ids=CASE_IDS)
@rules
def test_meta_update(rule, sizes, layout, dtype):
    check(rule, operands(rule, sizes, layout, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@rules
@pytest.mark.parametrize("lr", [10.0, 1e-6])
@pytest.mark.parametrize("parts", PARTS)
def test_meta_update_with_fewer_operands_at_large_and_small_rates(parts, lr, dtype, rule):
    check(rule, operands(rule, [63, 0, 1025], "guarded", dtype, parts), lr=lr)


@rules
@pytest.mark.parametrize("scale", [1.0, 0.375])
@pytest.mark.parametrize("only", ["decay", "l1", "prox", "none"])
@pytest.mark.parametrize("parts", ["plain", "anchored"])
def test_a_term_counts_when_the_others_are_absent(parts, only, scale, rule):
    """What is left out because its factor is 0, or 1, is left out alone."""
    factors = {name: NUMBERS[name] if name == only else 0.0 for name in ("decay", "l1", "prox")}
    check(rule, operands(rule, [63, 1025], "guarded", torch.float64, parts), state(scale=scale), **factors)


@pytest.mark.parametrize("count", [1.0, 2.0, 7.0, 40.0])
def test_bias_correction_follows_the_count(count):
    check("adamw", operands("adamw", [63], "guarded", torch.float32), state(count=count))


@rules
def test_a_thousand_steps_follow_the_same_thousand_steps_in_float64(rule):
    """From zero moments, as an optimizer begins, against torch's own."""
    theta = torch.randn(40, dtype=torch.float64)
    weight = torch.nn.Parameter(theta.clone())
    options = {"lr": 0.01, "weight_decay": 0.5}
    if rule == "sgd":
        other = torch.optim.SGD([weight], momentum=0.9, **options)
    else:
        other = torch.optim.AdamW([weight], betas=(0.9, 0.999), eps=1e-8, **options)
    first, second = torch.zeros(2, 40, dtype=torch.float64)
    hyper = hyper_parameters("cpu", lr=0.01, momentum=0.9, beta2=0.999, eps=1e-8, weight_decay=0.5)
    for count in range(1, 1001):
        a = torch.randn(40, dtype=torch.float64)
        weight.grad = a.clone()
        other.step()
        lists = [theta, a, None, first, second if rule == "adamw" else None, None, None, None]
        step(lists, state(count=count, scale=1.0), hyper)
    torch.testing.assert_close(theta, weight.detach(), rtol=1e-11, atol=1e-12)


@rules
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["guarded", "mixed"])
def test_where_the_mask_is_down_not_a_bit_moves(layout, dtype, rule):
    lists = operands(rule, [1025, 63], layout, dtype)
    before = [[x.clone() for x in lists[i] or ()] for i in (0, 3, 4)]
    step(lists, state(), packed(NUMBERS))
    for i, each in zip((0, 3, 4), before, strict=True):
        for now, was, mask in zip(lists[i] or (), each, lists[7], strict=False):
            assert torch.equal(now[~mask], was[~mask])
            # a half type may round back to where it was; most elements do not
            assert int((now[mask] != was[mask]).sum()) > 0.9 * int(mask.sum())


@rules
@pytest.mark.parametrize("layout", ["guarded", "mixed"])
@pytest.mark.parametrize("looks", [True, False], ids=["the host looks", "the host does not look"])
def test_with_the_flag_down_nothing_is_written(looks, layout, rule, monkeypatch):
    if not looks:
        monkeypatch.setattr(reference, "known", lambda *_: False)
    lists = operands(rule, [1025, 63], layout, torch.float32)
    lists[1][0].fill_(torch.nan)
    kept = Kept(*lists)
    step(lists, state(ok=0.0, scale=torch.nan), packed(NUMBERS))
    kept.check()


@rules
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("only", ["decay", "l1", "prox", "none", "all"])
def test_what_the_host_may_leave_out_changes_nothing(only, parts, rule, monkeypatch):
    """On a GPU the host does not look at the factors, and terms of factor 0 are computed: the same numbers."""
    factors = {name: NUMBERS[name] if only in (name, "all") else 0.0 for name in ("decay", "l1", "prox")}
    results = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(reference, "known", lambda *_: False)
        torch.manual_seed(0)
        lists = operands(rule, [63, 1025], "guarded", torch.float32, parts)
        step(lists, state(scale=1.0), packed(NUMBERS | factors))
        results.append([x for i in (0, 3, 4) for x in lists[i] or ()])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@rules
@pytest.mark.parametrize("piece", [1, 63, 64, 65, 128])
def test_where_pieces_end_makes_no_difference(piece, rule, monkeypatch):
    results = []
    for size in (reference.PIECE, piece):
        monkeypatch.setattr(reference, "PIECE", size)
        torch.manual_seed(0)
        lists = operands(rule, [63, 1, 0, 1025], "guarded", torch.float32)
        step(lists, state(), packed(NUMBERS))
        results.append([x for i in (0, 3, 4) for x in lists[i] or ()])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("clip", [1e-6, 0.5, 1e6, 0.0])
def test_a_clipped_step_has_the_length_of_the_clip(clip):
    theta, a, u = torch.randn(3, 500, dtype=torch.float64)
    start, control = theta.clone(), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    hyper = hyper_parameters("cpu", lr=1.0, clip=clip)
    ops.step_control(control, ops.grad_dot(a, u)[0], torch.ones(2), hyper)
    ops.meta_update(theta, a, u, torch.zeros_like(theta), control=control, hyper=hyper)
    length = (a + u).norm()
    torch.testing.assert_close((start - theta).norm(), torch.where((clip > 0) & (length > clip), clip, length))
