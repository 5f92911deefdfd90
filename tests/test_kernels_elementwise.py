"""displace, project, extrapolate and saliency against the reference in float64."""

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
    full_of_nan,
    kernels,
    modules,
    number,
    same,
)

from fastlur import reference

CASES = [pytest.param([size], True, id=str(size)) for size in SIZES]
CASES += [pytest.param([1025], False, id="strided"), pytest.param(UNEVEN, True, id="list")]
CASES += [pytest.param(UNEVEN, False, id="strided list")]
cases = pytest.mark.parametrize(("sizes", "contiguous"), CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def inputs(count, sizes, dtype, contiguous=True):
    return [draw(sizes, dtype, seed, contiguous) for seed in range(count)]


@dtypes
@cases
@pytest.mark.parametrize("alpha", [10.0, 1e-6])
def test_displace(sizes, contiguous, dtype, alpha):
    theta, d = inputs(2, sizes, dtype, contiguous)
    before = clones(theta), clones(d)
    out, truth = full_of_nan(theta), double(theta)
    kernels.displace(out, theta, d, number(alpha))
    reference.displace(truth, double(theta), double(d), number(alpha))
    close(out, truth, [t.abs() + alpha * v.abs() for t, v in zip(theta, d, strict=True)], steps=3)
    assert same(theta, before[0]) and same(d, before[1])


@pytest.mark.parametrize("norm2", [4.0, 1e-30, 0.0, -1.0, float("nan")])
def test_displace_by_a_relative_step(norm2):
    theta, d = inputs(2, UNEVEN, torch.float32)
    out, truth = full_of_nan(theta), double(theta)
    kernels.displace(out, theta, d, number(0.1), number(norm2))
    reference.displace(truth, double(theta), double(d), number(0.1), number(norm2))
    alpha = 0.1 / norm2**0.5 if norm2 > 0 else 0.0
    close(out, truth, [t.abs() + alpha * v.abs() for t, v in zip(theta, d, strict=True)], steps=3)
    if not norm2 > 0:
        assert same(out, theta)


def test_displace_in_place_and_into_another_dtype():
    theta, d = inputs(2, UNEVEN, torch.float32)
    out = [torch.empty_like(t, dtype=torch.float64) for t in theta]
    kernels.displace(out, theta, d, number(0.5))
    kernels.displace(theta, theta, d, number(0.5))
    assert same([o.float() for o in out], theta)


PROJECTIONS = ["one_sided", "symmetric", "scissorhands"]


@dtypes
@cases
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_project(sizes, contiguous, dtype, kind):
    a, b = inputs(2, sizes, dtype, contiguous)
    before = clones(a)
    dots = torch.tensor([-3.0, 2.0, 7.0], dtype=torch.float64, device=DEVICE)
    left, right = double(a), double(b)
    reference.project(left, right, dots, kind)
    s, t = (abs(float(x)) for x in reference.projection(dots, kind))
    sizes_a = [x.abs() + s * y.abs() for x, y in zip(a, b, strict=True)]
    sizes_b = [y.abs() + t * x.abs() for x, y in zip(a, b, strict=True)]
    kernels.project(a, b, dots, kind)
    close(a, left, sizes_a, steps=3)
    close(b, right, sizes_b, steps=3)
    assert same(a, before) == (kind != "symmetric" or sum(sizes) == 0)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize(
    "dots", [[3.0, 2.0, 7.0], [0.0, 2.0, 7.0], [-3.0, 0.0, 0.0], [-1e-3, 2.0, 7.0], [-9.0, 1.0, 0.0]]
)
def test_project_decides_as_the_reference_does(kind, dots):
    a, b = inputs(2, [63, 1025], torch.float64)
    dots = torch.tensor(dots, dtype=torch.float64, device=DEVICE)
    left, right, before = clones(a), clones(b), clones(a + b)
    reference.project(left, right, dots, kind)
    kernels.project(a, b, dots, kind)
    s, t = (abs(float(x)) for x in reference.projection(dots, kind))
    close(a, left, [x.abs() * (1 + s) + s * y.abs() for x, y in zip(left, right, strict=True)], steps=3)
    close(b, right, [y.abs() * (1 + t) + t * x.abs() for x, y in zip(left, right, strict=True)], steps=3)
    if dots[0] >= 0:
        assert same(a + b, before)


def test_project_refuses_an_unknown_kind_even_for_empty_lists():
    with pytest.raises(ValueError, match="kind='both'"):
        kernels.project([], [], torch.zeros(3, dtype=torch.float64), "both")


@dtypes
@cases
@pytest.mark.parametrize("eta", [1.0, 0.25])
def test_extrapolate(sizes, contiguous, dtype, eta):
    theta, theta0, memorised = inputs(3, sizes, dtype, contiguous)
    before = clones(theta0), clones(memorised)
    truth = double(theta)
    reference.extrapolate(truth, double(theta0), double(memorised), number(2.5), number(eta))
    scales = [
        eta * (3.5 * t0.abs() + 2.5 * m.abs()) + (1 - eta) * t.abs()
        for t, t0, m in zip(theta, theta0, memorised, strict=True)
    ]
    if eta == 1:
        for t in theta:
            t.fill_(float("nan"))
    kernels.extrapolate(theta, theta0, memorised, number(2.5), number(eta))
    close(theta, truth, scales, steps=6)
    assert same(theta0, before[0]) and same(memorised, before[1])


@dtypes
@cases
@pytest.mark.parametrize("weighted", [True, False])
def test_saliency(sizes, contiguous, dtype, weighted):
    grad, theta = inputs(2, sizes, dtype, contiguous)
    before = clones(grad), clones(theta)
    out, truth = full_of_nan(grad), double(grad)
    kernels.saliency(out, grad, theta if weighted else None)
    reference.saliency(truth, double(grad), double(theta) if weighted else None)
    close(out, truth, truth, steps=1)
    assert same(grad, before[0]) and same(theta, before[1])


@pytest.mark.parametrize("sizes", [[LARGE], [LARGE, 5]], ids=["flat", "list"])
def test_a_million_elements(sizes):
    theta, d = inputs(2, sizes, torch.float32)
    out, truth = full_of_nan(theta), double(theta)
    kernels.displace(out, theta, d, number(0.1))
    reference.displace(truth, double(theta), double(d), number(0.1))
    close(out, truth, [t.abs() + 0.1 * v.abs() for t, v in zip(theta, d, strict=True)], steps=3)


CALLS = {
    "displace": lambda x, y, z: kernels.displace(x, y, z, number(0.1)),
    "project": lambda x, y, z: kernels.project(x, y, torch.tensor([-3.0, 2.0, 7.0]).to(DEVICE).double(), "symmetric"),
    "extrapolate": lambda x, y, z: kernels.extrapolate(x, y, z, number(0.1), number(0.5)),
    "saliency": lambda x, y, z: kernels.saliency(x, y, z),
}


@dtypes
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("offset", [8, 3])
def test_nothing_is_written_beside_the_tensors(name, offset, dtype, monkeypatch):
    """Slices of one buffer, 16-byte aligned or not, whose neighbours are NaN before and after."""
    monkeypatch.setattr(modules[name], "BLOCK", 64)
    sizes = [1, 63, 64, 65, 0, 200]
    buffers, slices = [], []
    for seed in range(3):
        buffer = torch.full((6 * 256 + 8,), float("nan"), dtype=dtype, device=DEVICE)
        parts = [buffer[offset + 256 * i : offset + 256 * i + size] for i, size in enumerate(sizes)]
        for part, values in zip(parts, draw(sizes, dtype, seed), strict=True):
            part.copy_(values)
        buffers.append(buffer)
        slices.append(parts)
    alone = [clones(each) for each in slices]
    CALLS[name](*slices)
    CALLS[name](*alone)
    for buffer, parts, copies in zip(buffers, slices, alone, strict=True):
        assert same(parts, copies)
        assert int(buffer.isnan().sum()) == buffer.numel() - sum(sizes)
