"""meta_update, regularize and step_control against the reference in float64."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    LARGE,
    SIZES,
    UNEVEN,
    clones,
    close,
    double,
    draw,
    kernels,
    modules,
    number,
    same,
)

from fastlur import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
rules = pytest.mark.parametrize("rule", ["sgd", "adamw"])


def hyper(**changed):
    values = {"lr": 0.1, "momentum": 0.9, "beta2": 0.99, "eps": 1e-3, "decay": 0.5, "l1": 0.25, "prox": 0.75, "clip": 0}
    assert len(values) == reference.HYPER
    values.update(changed)
    return torch.tensor(list(values.values()), dtype=torch.float64, device=DEVICE)


def control(ok=1.0, count=3.0, scale=0.5):
    return torch.tensor([ok, count, scale], dtype=torch.float64, device=DEVICE)


def operands(rule, sizes, dtype=torch.float32, contiguous=True, extras=True):
    """The eight lists of meta_update, in its order; the second moment and the Fisher weights are not negative."""
    theta, a, u, first, second, theta0, fisher, mask = (draw(sizes, dtype, seed, contiguous) for seed in range(8))
    for x in (*second, *fisher):
        x.abs_()
    second = second if rule == "adamw" else None
    if not extras:
        return [theta, a, None, first, second, None, None, None]
    return [theta, a, u, first, second, theta0, fisher, [m > 0 for m in mask]]


def sizes_of_terms(lists, values, state):
    """For θ, m and v after the step: the absolute sum of what each was computed from, mask aside."""
    lr, beta1, beta2, eps, decay, l1, prox, _ = values.tolist()
    count, scale = state[1:].tolist()
    found = []
    for place in range(len(lists[0])):
        t, a, u, m, v, t0, f, _ = (None if each is None else each[place].double().abs() for each in lists)
        g = scale * (a + (0 if u is None else u)) + l1
        if t0 is not None:
            g = g + prox * (t + t0) * (1 if f is None else f)
        if v is None:
            m = beta1 * m + g + decay * t
            found.append((t + lr * m, m))
            continue
        m, moved = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        # relative to the root that the step divides by, which is at least that of what was there
        root = (beta2 * v / (1 - beta2**count)).sqrt()
        away = m / (1 - beta1**count) / (root + eps) * (1 + moved / (beta2 * v))
        if lists[0][place].dtype == torch.float64:
            # βⁿ by squaring is off by up to n roundings, which 1 − βⁿ magnifies; for narrower dtypes they are float64's
            away = away * (1 + sum(count * beta**count / (1 - beta**count) for beta in (beta1, beta2)))
        found.append((t * (1 + lr * decay) + lr * away, m, moved))
    return list(zip(*found, strict=True))


def check(rule, lists, values, state):
    truth = [double(each) for each in lists[:7]] + [lists[7]]
    scales = sizes_of_terms(lists, values, state)
    kept = [clones(lists[i]) for i in (1, 2, 5, 6, 7)]
    numbers = values.clone(), state.clone()
    reference.meta_update(*truth, state, values)
    kernels.meta_update(*lists, state, values)
    for place, scale in zip((0, 3, 4) if rule == "adamw" else (0, 3), scales, strict=True):
        close(lists[place], truth[place], scale, steps=16)
    for place, before in zip((1, 2, 5, 6, 7), kept, strict=True):
        assert before is None or same(lists[place], before)
    assert same([values, state], numbers)


@dtypes
@rules
@pytest.mark.parametrize(
    ("sizes", "contiguous"), [*(([size], True) for size in SIZES), ([1025], False), (UNEVEN, True), (UNEVEN, False)]
)
def test_meta_update(sizes, contiguous, dtype, rule):
    check(rule, operands(rule, sizes, dtype, contiguous), hyper(), control())


@rules
def test_meta_update_of_a_million_elements(rule):
    check(rule, operands(rule, [LARGE], torch.float32), hyper(), control())


@dtypes
@rules
@pytest.mark.parametrize("lr", [10.0, 1e-6])
def test_meta_update_without_extras_at_large_and_small_rates(lr, dtype, rule):
    check(rule, operands(rule, [1025], dtype, extras=False), hyper(lr=lr, l1=0, prox=0), control(scale=1))


@rules
@pytest.mark.parametrize("absent", [2, 5, 6, 7], ids=["u", "theta0", "fisher", "mask"])
def test_meta_update_when_an_operand_is_absent(absent, rule):
    lists = operands(rule, [63, 1025])
    lists[absent] = None
    check(rule, lists, hyper(), control())


@pytest.mark.parametrize("count", [1.0, 2.0, 7.0, 1000.0, 123_457.0])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_bias_correction(count, beta1):
    lists = operands("adamw", [63], torch.float64)
    check("adamw", lists, hyper(momentum=beta1, beta2=0.9999), control(count=count))


@dtypes
@rules
def test_masked_weights_and_moments_do_not_move(dtype, rule):
    lists = operands(rule, [1025, 63], dtype)
    before = [clones(each) for each in lists]
    kernels.meta_update(*lists, control(), hyper())
    for place in (0, 3, 4) if rule == "adamw" else (0, 3):
        for now, was, keep in zip(lists[place], before[place], lists[7], strict=True):
            assert same([now[~keep]], [was[~keep]])
            # a low-precision number may round back to itself; most do not
            assert int((now[keep] != was[keep]).sum()) > 0.9 * int(keep.sum())


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.int64])
def test_a_mask_may_be_of_any_dtype(kind):
    lists, others = operands("sgd", [63, 1025]), operands("sgd", [63, 1025])
    others[7] = [2 * m.to(kind) for m in lists[7]]
    kernels.meta_update(*lists, control(), hyper())
    kernels.meta_update(*others, control(), hyper())
    assert same(lists[0], others[0]) and same(lists[3], others[3])


@dtypes
@rules
@pytest.mark.parametrize("contiguous", [True, False])
def test_nothing_is_written_when_the_flag_is_down(contiguous, dtype, rule):
    lists = operands(rule, [1025, 63], dtype, contiguous)
    lists[1][0].fill_(float("nan"))
    before = [clones(each) for each in lists]
    kernels.meta_update(*lists, control(ok=0.0), hyper())
    assert all(now is None or same(now, was) for now, was in zip(lists, before, strict=True))


@rules
def test_meta_update_with_moments_of_another_dtype(rule):
    lists = operands(rule, [63, 1025, 4], torch.float32)
    for place in (0, 1, 2, 5, 6):
        lists[place] = [x.bfloat16() for x in lists[place]]
    check(rule, lists, hyper(), control())


def test_meta_update_of_empty_lists():
    kernels.meta_update([], [], None, [], None, None, None, None, control(), hyper())


@dtypes
@pytest.mark.parametrize(
    ("sizes", "contiguous"), [*(([size], True) for size in SIZES), ([1025], False), (UNEVEN, True), (UNEVEN, False)]
)
@pytest.mark.parametrize("form", ["plain", "proximal", "fisher"])
def test_regularize(sizes, contiguous, dtype, form):
    check_regularize(sizes, contiguous, dtype, form)


def test_regularize_of_a_million_elements():
    check_regularize([LARGE], True, torch.float32, "fisher")


def check_regularize(sizes, contiguous, dtype, form):
    grad, theta, theta0, fisher = (draw(sizes, dtype, seed, contiguous) for seed in range(4))
    theta0 = None if form == "plain" else theta0
    fisher = fisher if form == "fisher" else None
    values, truth, kept = hyper(), double(grad), [clones(each) for each in (theta, theta0, fisher)]
    want = reference.regularize(truth, double(theta), double(theta0), double(fisher), values)
    slopes, terms, bound = [], 0.0, 0.0
    for place, t in enumerate(double(theta)):
        f = 1 if fisher is None else fisher[place].double().abs()
        away = 0 * t if theta0 is None else t.abs() + theta0[place].double().abs()
        slopes.append(grad[place].double().abs() + 0.5 * t.abs() + 0.25 + 0.75 * f * away)
        terms = float((0.25 * t * t + 0.25 * t.abs() + 0.375 * f * away * away).sum())
        bound += terms * torch.finfo(torch.float64 if t.dtype == theta[place].dtype else torch.float32).eps / 2
    got = kernels.regularize(grad, theta, theta0, fisher, values)
    close(grad, truth, slopes, steps=8)
    assert got.shape == () and got.dtype == torch.float64
    assert abs(float(got - want)) <= 32 * bound  # ten roundings a term, up to twenty-two additions
    for now, was in zip((theta, theta0, fisher), kept, strict=True):
        assert was is None or same(now, was)


@pytest.mark.parametrize("size", [15, 16, 47, 48, 49, 97, 16 * 7 + 5])
def test_regularize_when_programs_go_round_the_blocks(size, monkeypatch):
    monkeypatch.setattr(modules["regularize"], "BLOCK", 16)
    monkeypatch.setattr(modules["regularize"], "PARTIALS", 3)
    check_regularize([size], True, torch.float32, "fisher")
    check_regularize([size, 31, 0, 16], True, torch.float32, "fisher")


def test_regularize_mixed_dtypes_and_empty_lists():
    kinds = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16]
    check_regularize([63, 65, 0, 9, 4], True, kinds, "fisher")
    assert float(kernels.regularize([], [], None, None, hyper())) == 0.0


def test_the_fisher_weights_are_not_used_without_an_anchor():
    grad, theta, fisher = (draw([63], seed=seed) for seed in range(3))
    alone = clones(grad)
    value = kernels.regularize(grad, theta, None, fisher, hyper())
    assert float(value) == float(kernels.regularize(alone, theta, None, None, hyper()))
    assert same(grad, alone)


@dtypes
@pytest.mark.parametrize("name", ["update", "regularize"])
@pytest.mark.parametrize("offset", [8, 3])
def test_nothing_is_written_beside_the_tensors(name, offset, dtype, monkeypatch):
    """Slices of one buffer, 16-byte aligned or not, whose neighbours are NaN before and after."""
    monkeypatch.setattr(modules[name], "BLOCK", 64)
    sizes = [1, 63, 64, 65, 0, 200]
    buffers, slices = [], []
    for values in operands("adamw", sizes, dtype)[:7]:
        buffers.append(torch.full((6 * 256 + 8,), float("nan"), dtype=dtype, device=DEVICE))
        slices.append([buffers[-1][offset + 256 * i : offset + 256 * i + size] for i, size in enumerate(sizes)])
        for part, value in zip(slices[-1], values, strict=True):
            part.copy_(value)
    alone = [clones(each) for each in slices]
    for lists in (slices, alone):
        if name == "update":
            kernels.meta_update(*lists, None, control(), hyper())
        else:
            kernels.regularize(*lists[:4], hyper())
    for buffer, parts, copies in zip(buffers, slices, alone, strict=True):
        assert same(parts, copies)
        assert int(buffer.isnan().sum()) == buffer.numel() - sum(sizes)


INF, NAN = float("inf"), float("nan")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy, at ∞ − ∞
@pytest.mark.parametrize("clip", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("ok", [1.0, 0.0])
@pytest.mark.parametrize("losses", [[0.5, 2.0], [NAN, 1.0], [1.0, -INF], [1.0], [], [0.1] * 5])
@pytest.mark.parametrize(
    "dots", [[1.0, 4.0, 9.0], [-1.0, 1.0, 1.0 - 1e-9], [NAN, 1.0, 1.0], [1.0, INF, 1.0], [0.0] * 3]
)
def test_step_control(dots, losses, ok, clip):
    state, truth = control(ok, 4.0, NAN), control(ok, 4.0, NAN)
    dots = torch.tensor(dots, dtype=torch.float64, device=DEVICE)
    losses = torch.tensor(losses, dtype=torch.float32, device=DEVICE)
    reference.step_control(truth, dots, losses, hyper(clip=clip))
    kernels.step_control(state, dots, losses, hyper(clip=clip))
    assert state[:2].tolist() == truth[:2].tolist()
    torch.testing.assert_close(state[2], truth[2], rtol=4 * torch.finfo(torch.float64).eps, atol=0)


def test_step_control_takes_losses_of_any_shape_and_dtype():
    dots = torch.tensor([1.5, 4.0, 9.0], dtype=torch.float64, device=DEVICE)
    for losses in (number(0.5), torch.ones(2, 3, device=DEVICE).half().t(), torch.ones(2, device=DEVICE).bfloat16()):
        state = control(count=0.0)
        kernels.step_control(state, dots, losses, hyper(clip=2.0))
        assert state.tolist() == [1.0, 1.0, 0.5]


def test_the_flag_stays_down():
    state, dots = control(count=0.0), torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64, device=DEVICE)
    for loss in (1.0, NAN, 1.0):
        kernels.step_control(state, dots, number(loss), hyper())
    assert state[:2].tolist() == [0.0, 1.0]
