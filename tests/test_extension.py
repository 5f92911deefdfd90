"""The compiled extension against float64 truth, and its build.

A compiler that is present and a build that fails is a failure; without a compiler the tests are skipped, unless
FASTLUR_EXT=1 asks for them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlur import _extension as extension
from fastlur import reference

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "tests"
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 63, 1023, 1025]
LARGE = 2**20 + 3  # some dozens of blocks and a tail
GUARD = 64  # elements on either side of an output that must not change


def build(root, *arguments, **environment):
    """Runs setup.py's build_ext, as an installer would, with the environment given."""
    command = [sys.executable, "setup.py", "build_ext", *arguments]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **environment,
    }
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    if named := os.environ.get("FASTLUR_EXT_PATH"):
        assert extension.load(named) is None, extension.load(named)
        assert extension.library() == Path(named).resolve()
        return
    if COMPILER is None:
        if os.environ.get("FASTLUR_EXT") == "1":
            pytest.fail("FASTLUR_EXT=1, but there is no C++ compiler; install one or name it in CXX")
        pytest.skip("no C++ compiler")
    done = build(ROOT, f"--build-lib={BUILT}/lib", f"--build-temp={BUILT}/temp", FASTLUR_EXT="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = (BUILT / "lib" / "fastlur").glob("_native*.so")
    if extension.library() in (None, library.resolve()):
        assert extension.load(library) is None
        assert extension.library() == library.resolve()
        return
    # a test before these has loaded another one, perhaps of older sources: what was just built is tested elsewhere
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "FASTLUR_EXT_PATH": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"in a process of its own, because {extension.library()} is loaded here:\n{done.stdout[-4000:]}")
    pytest.skip(f"passed in a process of its own, because {extension.library()} is loaded here")


def numbers(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def hyper(lr=0.1, momentum=0.9, beta2=0.99, eps=1e-8, decay=0.0, l1=0.0, prox=0.0, clip=0.0):
    return numbers(lr, momentum, beta2, eps, decay, l1, prox, clip)


def control(ok=1.0, count=3.0, scale=0.75):
    return numbers(ok, count, scale)


class Lists:
    """Lists of random tensors inside guarded memory, so that a stray write is seen."""

    def __init__(self, shapes, dtype, contiguous=True, seed=0):
        self.shapes, self.dtype, self.contiguous = shapes, dtype, contiguous
        self.random = torch.Generator().manual_seed(seed)
        self.held = []  # (memory, what it holds inside the guards, tensor, copy, whether it may be written)

    def new(self, written=False, poisoned=False, positive=False):
        tensors = []
        for shape in self.shapes:
            step = 1 if self.contiguous else 2
            size = torch.Size(shape).numel()
            memory = torch.full((size * step + 2 * GUARD,), 7.0, dtype=self.dtype)
            inside = memory[GUARD : GUARD + size * step].view(*shape, step)[..., 0]
            value = torch.randn(shape, generator=self.random, dtype=torch.float64)
            inside.copy_(torch.nan if poisoned else value.abs() if positive else value)
            tensors.append(inside)
            self.held.append((memory, inside, inside.clone(), written))
        return tensors

    def check(self):
        """Inputs are unchanged, and so is everything around what may be written."""
        for memory, inside, before, written in self.held:
            if not written:
                assert torch.equal(inside, before)
            inside.fill_(7.0)
            assert torch.equal(memory, torch.full_like(memory, 7.0))


def double(tensors):
    """Copies, even of what is float64 already: truth and trial must not share memory."""
    return None if tensors is None else [tensor.to(torch.float64, copy=True) for tensor in tensors]


def assert_close(actual, truth, scale, roundings):
    """Within so many roundings of the dtype, relative to the largest term that entered each element."""
    for x, y, s in zip(actual, truth, scale, strict=True):
        wide = max(torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny)
        # one rounding when stored, the others in the type computed with; below the normal numbers steps are absolute
        computed = min(wide, torch.finfo(torch.float32).eps)
        limit = (wide + roundings * computed) * s.abs() + torch.finfo(x.dtype).smallest_normal
        assert ((x.double() - y).abs() <= limit).all()


def magnitudes(*terms):
    return [sum(term.abs() for term in place) for place in zip(*terms, strict=True)]


CASES = [
    *(pytest.param([(size,)], dtype, True, id=f"{size}-{dtype}") for size in SIZES for dtype in DTYPES),
    *(pytest.param([(LARGE,)], dtype, True, id=f"{LARGE}-{dtype}") for dtype in (torch.float32, torch.bfloat16)),
    *(pytest.param([(7, 5), (3,), (2, 3, 4)], dtype, False, id=f"strided-{dtype}") for dtype in DTYPES),
    pytest.param([(1025,)], torch.float32, False, id="strided-1025"),
    pytest.param([(2**17,)] + [(k % 5,) for k in range(100)], torch.float32, True, id="huge-and-tiny"),
    pytest.param([(k % 7, 3) for k in range(200)], torch.bfloat16, True, id="all-tiny"),
    pytest.param([(), (1, 1), (0, 4), (33,)], torch.float32, True, id="scalars"),
]
everywhere = pytest.mark.parametrize(("shapes", "dtype", "contiguous"), CASES)
a_few = pytest.mark.parametrize(
    ("shapes", "dtype", "contiguous"),
    [
        *(pytest.param([(1025,), (3, 2)], dtype, True, id=str(dtype)) for dtype in DTYPES),
        pytest.param([(7, 5), (65,)], torch.float32, False, id="strided"),
        pytest.param([(2**17 + 3,), (5,)], torch.bfloat16, True, id="blocks"),
    ],
)


@everywhere
def test_grad_dot(shapes, dtype, contiguous):
    lists = Lists(shapes, dtype, contiguous)
    a, b = lists.new(), lists.new()
    total, each = extension.grad_dot(a, b)
    truth_total, truth_each = reference.grad_dot(double(a), double(b))
    scale = reference.grad_dot([x.double().abs() for x in a], [x.double().abs() for x in b])
    eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    # 256 products are added up in the type computed with; the errors of float64 after that are as many again at most
    assert ((total - truth_total).abs() <= 256 * eps * scale[0] + 1e-300).all()
    assert ((each - truth_each).abs() <= 256 * eps * scale[1] + 1e-300).all()
    assert total.dtype == each.dtype == torch.float64 and each.shape == (len(a), 3)
    lists.check()


def test_float64_takes_over_before_float32_runs_out_of_digits():
    """Of whole numbers, one of them odd: a float32 sum of a whole block would lose it."""
    x = torch.full((2**15,), 64.0)
    x[7] = 1.0
    exact = (2**15 - 1) * 4096 + 1
    assert extension.grad_dot([x], [x])[0].tolist() == [exact] * 3
    assert float(extension.regularize([torch.zeros_like(x)], [x], None, None, hyper(decay=2.0))) == exact


def test_a_dot_does_not_depend_on_the_tensors_beside_it():
    a, b = torch.randn(100_003), torch.randn(100_003)
    others = [torch.randn(k) for k in (1, 70_000, 33)]
    alone = extension.grad_dot([a], [b])[1][0]
    assert torch.equal(extension.grad_dot([*others, a], [*others, b])[1][3], alone)


def test_grad_dot_has_one_bit_pattern():
    a, b = torch.randn(100_003), torch.randn(100_003)
    lists = [a, a[:17], a[5:]], [b, b[:17], b[5:]]
    threads = torch.get_num_threads()
    try:
        patterns = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            patterns |= {
                tuple(part.numpy().tobytes() for part in extension.grad_dot(*lists))
                for _ in range(1000 if count == 2 else 20)
            }
            value = extension.regularize([a.clone()], [b], None, None, hyper(decay=0.5, l1=0.1))
            patterns.add(value.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(patterns) == 2  # one of the dots, one of the penalty's value


@everywhere
def test_displace(shapes, dtype, contiguous):
    lists = Lists(shapes, dtype, contiguous)
    out, theta, d = lists.new(written=True, poisoned=True), lists.new(), lists.new()
    for norm2 in (None, numbers(3.0)):
        truth = [torch.empty_like(x, dtype=torch.float64) for x in out]
        reference.displace(truth, double(theta), double(d), numbers(10.0), norm2)
        extension.displace(out, theta, d, numbers(10.0), norm2)
        assert_close(out, truth, magnitudes(double(theta), [10 * x for x in double(d)]), 3)
    lists.check()


def test_displace_past_the_cache_and_off_the_line():
    theta, d = torch.randn(2**23 + 77), torch.randn(2**23 + 77)
    out = torch.full((2**23 + 80,), torch.nan)
    extension.displace([out[1:-2]], [theta], [d], numbers(0.5))
    torch.testing.assert_close(out[1:-2], theta - 0.5 * d)
    assert out[[0, -2, -1]].isnan().all()


def test_displace_by_a_norm_of_zero_is_no_displacement():
    theta, out = torch.randn(100), torch.empty(100)
    extension.displace([out], [theta], [torch.randn(100)], numbers(1.0), numbers(0.0))
    assert torch.equal(out, theta)


def test_the_output_may_be_an_operand():
    theta, d = torch.randn(5000), torch.randn(5000)
    expected = theta - 0.5 * d
    extension.displace([theta], [theta], [d], numbers(0.5))
    torch.testing.assert_close(theta, expected)


@pytest.mark.parametrize("loss", [[0.5, 2.0], [torch.inf, 0.0], [torch.nan], []])
@pytest.mark.parametrize("dots", [(1.0, 2.0, 3.0), (-1.0, 1.0, 1.0), (-1.1, 1.0, 1.0), (torch.nan, 1.0, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_control(loss, dots, dtype):
    losses = torch.tensor(loss, dtype=dtype)
    for clip in (0.0, 1.5, 100.0):
        for ok in (0.0, 1.0):
            actual, truth = control(ok), control(ok)
            extension.step_control(actual, numbers(*dots), losses, hyper(clip=clip))
            reference.step_control(truth, numbers(*dots), losses, hyper(clip=clip))
            torch.testing.assert_close(actual, truth, rtol=1e-15, atol=0, equal_nan=True)


@everywhere
def test_regularize(shapes, dtype, contiguous):
    check_regularize(shapes, dtype, contiguous, "fisher")


@a_few
@pytest.mark.parametrize("terms", ["norms", "proximal"])
def test_regularize_with_fewer_terms(shapes, dtype, contiguous, terms):
    check_regularize(shapes, dtype, contiguous, terms)


def check_regularize(shapes, dtype, contiguous, terms):
    lists = Lists(shapes, dtype, contiguous)
    grad, theta = lists.new(written=True), lists.new()
    theta0 = None if terms == "norms" else lists.new()
    fisher = lists.new(positive=True) if terms == "fisher" else None
    h = hyper(decay=0.5, l1=0.1, prox=0.3)
    truth = double(grad)
    truth_value = reference.regularize(truth, double(theta), double(theta0), double(fisher), h)
    scale = [1.0 + g.double().abs() + t.double().abs() for g, t in zip(grad, theta, strict=True)]
    if theta0 is not None:
        one = [torch.ones_like(t, dtype=torch.float64) for t in theta] if fisher is None else double(fisher)
        scale = [s + f * t.double().abs() + f * s for s, f, t in zip(scale, one, theta0, strict=True)]
    value = extension.regularize(grad, theta, theta0, fisher, h)
    assert_close(grad, truth, scale, 8)
    eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    assert value.shape == () and (value - truth_value).abs() <= 256 * eps * truth_value
    lists.check()


def step_scales(theta, m1, m2, a, u, theta0, fisher, c, h):
    """For each output the sum of the terms that enter it, all positive: what rounding errors are relative to."""
    scales = [], [], []
    for i, weight in enumerate(theta):
        g = (a[i].abs() + (0 if u is None else u[i].abs())) * c[reference.SCALE]
        g = g + weight.abs() * h[reference.WEIGHT_DECAY] + h[reference.L1]
        if theta0 is not None:
            g = g + (weight.abs() + theta0[i].abs()) * (1 if fisher is None else fisher[i]) * h[reference.PROX]
        first = m1[i].abs() + g
        scales[1].append(first)
        if m2 is None:
            scales[0].append(weight.abs() + h[reference.LR] * first)
            continue
        fresh = g.square() * (1 - h[reference.BETA2])
        second = m2[i] * h[reference.BETA2]
        scales[2].append(second + fresh)
        one, two = (1 - h[k] ** c[reference.COUNT] for k in (reference.MOMENTUM, reference.BETA2))
        away = first / one / (second / two).sqrt() * (1 + fresh / second)
        scales[0].append(weight.abs() * (1 + h[reference.LR] * h[reference.WEIGHT_DECAY]) + h[reference.LR] * away)
    return scales


def run_update(shapes, dtype, contiguous, h, c, adam=False, both=True, terms="none", masked=False):
    """One step by the extension, held against the truth; returns what is written, after and before, and the mask."""
    lists = Lists(shapes, dtype, contiguous)
    theta, m1 = lists.new(written=True), lists.new(written=True)
    m2 = lists.new(written=True, positive=True) if adam else None
    a, u = lists.new(), lists.new() if both else None
    theta0 = None if terms == "none" else lists.new()
    fisher = lists.new(positive=True) if terms == "fisher" else None
    mask = [torch.rand(x.shape, generator=lists.random) < 0.5 for x in theta] if masked else None
    written = [theta, m1, *([m2] if adam else [])]
    before = [[x.clone() for x in each] for each in written]
    truth = [double(each) for each in (theta, m1, m2)]
    rest = [double(each) for each in (theta0, fisher)]
    scales = step_scales(*truth, double(a), double(u), *rest, c, h)
    reference.meta_update(truth[0], double(a), double(u), truth[1], truth[2], *rest, mask, c, h)
    extension.meta_update(theta, a, u, m1, m2, theta0, fisher, mask, c, h)
    if c[reference.OK] > 0:
        for each, expected, scale in zip(written, truth, scales, strict=False):
            assert_close(each, expected, scale, 24)
    after = [[x.clone() for x in each] for each in written]
    lists.check()
    return after, before, mask


@everywhere
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
def test_meta_update(shapes, dtype, contiguous, adam):
    run_update(shapes, dtype, contiguous, hyper(decay=0.5), control(), adam)


@a_few
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize("lr", [10.0, 1e-6])
@pytest.mark.parametrize(
    ("both", "terms", "masked"), [(False, "none", True), (True, "prox", False), (True, "fisher", True)]
)
def test_meta_update_with_every_operand(shapes, dtype, contiguous, adam, lr, both, terms, masked):
    h = hyper(lr=lr, decay=0.5, l1=0.1, prox=0.3)
    after, before, mask = run_update(shapes, dtype, contiguous, h, control(), adam, both, terms, masked)
    for now, then in zip(after, before, strict=True):
        for i, (x, y) in enumerate(zip(now, then, strict=True)):
            if masked:
                assert torch.equal(x[~mask[i]], y[~mask[i]])
    assert not all(torch.equal(x, y) for x, y in zip(after[1], before[1], strict=True))


def test_a_small_step_is_not_lost_in_the_tolerance():
    """At lr = 1e-6 the weights hardly move: here the move itself is compared."""
    theta, a = torch.randn(5000, dtype=torch.float64), torch.randn(5000, dtype=torch.float64)
    before, moment = theta.clone(), torch.zeros_like(theta)
    extension.meta_update([theta], [a], None, [moment], None, None, None, None, control(scale=0.5), hyper(lr=1e-6))
    torch.testing.assert_close(before - theta, 5e-7 * a, rtol=1e-6, atol=1e-15)
    assert torch.equal(moment, 0.5 * a)


@a_few
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
def test_nothing_is_written_when_the_flag_is_down(shapes, dtype, contiguous, adam):
    after, before, _ = run_update(shapes, dtype, contiguous, hyper(lr=torch.nan), control(ok=0.0), adam)
    for now, then in zip(after, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(now, then, strict=True))


KINDS = pytest.mark.parametrize("kind", ["one_sided", "symmetric", "scissorhands"])


@everywhere
@KINDS
def test_project(shapes, dtype, contiguous, kind):
    check_project(shapes, dtype, contiguous, kind, [numbers(-2.0, 4.0, 1.0)])


@a_few
@KINDS
def test_project_by_every_factor(shapes, dtype, contiguous, kind):
    no_conflict, zero, large = numbers(2.0, 4.0, 1.0), numbers(-1.0, 0.0, 0.0), numbers(-9.0, 4.0, 1.0)
    check_project(shapes, dtype, contiguous, kind, [no_conflict, zero, large])


def check_project(shapes, dtype, contiguous, kind, cases):
    for dots in cases:
        lists = Lists(shapes, dtype, contiguous)
        a, b = lists.new(written=kind == "symmetric"), lists.new(written=True)
        truth_a, truth_b = double(a), double(b)
        reference.project(truth_a, truth_b, dots, kind)
        s, t = (factor.abs() for factor in reference.projection(dots, kind))
        before = [x.clone() for x in b]
        scale_a = magnitudes(double(a), [x * s for x in double(b)])
        scale_b = magnitudes(double(b), [x * t for x in double(a)])
        extension.project(a, b, dots, kind)
        assert_close(a, truth_a, scale_a, 3)
        assert_close(b, truth_b, scale_b, 3)
        if dots[0] > 0:
            assert all(torch.equal(x, y) for x, y in zip(b, before, strict=True))
        lists.check()


@everywhere
@pytest.mark.parametrize("eta", [1.0, 0.25])
def test_extrapolate(shapes, dtype, contiguous, eta):
    lists = Lists(shapes, dtype, contiguous)
    theta = lists.new(written=True, poisoned=eta == 1.0)
    theta0, memorised = lists.new(), lists.new()
    truth = double(theta)
    reference.extrapolate(truth, double(theta0), double(memorised), numbers(10.0), numbers(eta))
    scale = magnitudes([11 * x for x in double(theta0)], [10 * x for x in double(memorised)])
    if eta != 1.0:
        scale = magnitudes(scale, double(theta))
    extension.extrapolate(theta, theta0, memorised, numbers(10.0), numbers(eta))
    assert_close(theta, truth, scale, 5)
    lists.check()


@everywhere
def test_saliency(shapes, dtype, contiguous):
    lists = Lists(shapes, dtype, contiguous)
    out, grad, weights = lists.new(written=True, poisoned=True), lists.new(), lists.new()
    for theta in (weights, None):
        truth = [torch.empty_like(x, dtype=torch.float64) for x in out]
        reference.saliency(truth, double(grad), double(theta))
        extension.saliency(out, grad, theta)
        assert_close(out, truth, truth, 1)
    lists.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_short_number_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    back, none = torch.empty_like(every), torch.zeros_like(every)
    extension.displace([back], [every], [none], numbers(0.0))
    # a NaN may change its bits, all else must not
    assert torch.equal(back.isnan(), every.isnan())
    assert torch.equal(back[~back.isnan()], every[~every.isnan()])
    # halves between neighbours, overflow and underflow: the products must be rounded as torch rounds them
    for factor in (1.5, 1 / 3, 1e-3, 3e4):
        x = every[every.isfinite()]
        extension.displace([out := torch.empty_like(x)], [torch.zeros_like(x)], [x], numbers(-factor))
        assert torch.equal(out, (x.float() * factor).to(dtype))


def test_empty_lists():
    total, each = extension.grad_dot([], [])
    assert torch.equal(total, torch.zeros(3).double()) and each.shape == (0, 3)
    extension.displace([], [], [], numbers(1.0))
    assert extension.regularize([], [], None, None, hyper()).item() == 0
    extension.meta_update([], [], None, [], [], None, None, None, control(), hyper())
    extension.project([], [], numbers(-1.0, 1.0, 1.0), "symmetric")
    extension.extrapolate([], [], [], numbers(1.0), numbers(1.0))
    extension.saliency([], [], None)


def test_places_may_differ_in_dtype():
    a = [torch.randn(100).to(dtype) for dtype in DTYPES]
    b = [torch.randn(100).to(dtype) for dtype in DTYPES]
    _, each = extension.grad_dot(a, b)
    torch.testing.assert_close(each, reference.grad_dot(double(a), double(b))[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: extension.grad_dot([x], [x, x]), "2 tensors"),
        (lambda x: extension.grad_dot([x], [x[:5]]), "shape"),
        (lambda x: extension.grad_dot([x], [x.double()]), "dtype"),
        (lambda x: extension.grad_dot([x.int()], [x.int()]), "float32"),
        (lambda x: extension.displace([x], [x], [x], torch.tensor(1.0)), "float64"),
        (
            lambda x: extension.meta_update([x], [x], None, [x], None, None, None, None, numbers(1.0), hyper()),
            "control",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.zeros(10))


def test_an_unknown_projection_is_refused():
    with pytest.raises(ValueError, match="'sideways' is no projection"):
        extension.project([torch.zeros(1)], [torch.zeros(1)], numbers(-1.0, 1.0, 1.0), "sideways")


def test_autograd_notices_what_is_written():
    leaf, weight = torch.randn(10, requires_grad=True), torch.randn(10)
    product = (leaf * weight).sum()
    extension.displace([weight], [torch.zeros(10)], [torch.ones(10)], numbers(1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_the_layout_is_that_of_the_reference():
    text = (ROOT / "csrc" / "layout.h").read_text()
    for names in re.findall(r"enum \w+ \{([^}]*)\}", text):
        for place, name in enumerate(names.split(",")):
            assert getattr(reference, name.strip()) == place


def test_another_library_than_the_one_that_is_loaded_is_refused(tmp_path):
    here = extension.library()
    assert extension.load() is None and extension.load(here) is None
    for other in (tmp_path / "none.so", shutil.copy(here, tmp_path / "copy.so")):
        assert str(here) in extension.load(other) and "another process" in extension.load(other)
    assert extension.library() == here and extension.loaded()


def test_no_message_tells_where_it_was_built():
    with pytest.raises(RuntimeError, match="dtype that does not go with") as error:
        extension.displace([torch.ones(3)], [torch.ones(3)], [torch.ones(3).double()], numbers(1.0))
    assert str(ROOT) not in str(error.value) and "csrc/" in str(error.value)


def test_a_library_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    code = "from fastlur import _extension as e; print(e.load()); print(e.missing())"
    environment = {**os.environ, "FASTLUR_EXT_PATH": str(tmp_path / "broken.so")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("broken.so cannot be loaded") == 2


@pytest.mark.skipif(os.environ.get("FASTLUR_SANITIZE") == "1", reason="says nothing about memory")
@pytest.mark.parametrize(("wish", "fatal"), [("1", True), ("", False), ("0", False)])
def test_only_a_build_that_was_asked_for_may_fail(tmp_path, wish, fatal):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "fastlur", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = build(tmp_path, "--inplace", FASTLUR_EXT=wish, CXX="/bin/false", CC="/bin/false")
    assert (done.returncode != 0) == fatal, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: fastlur")]
    assert len(warnings) == (wish == "")
    assert not list(tmp_path.glob("fastlur/*.so"))
