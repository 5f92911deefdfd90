"""The operations as torch's tracers see them: schemas and fakes that hold, and one graph with the numbers of eager."""

from __future__ import annotations

import pytest
import torch
from building import needs_compiler
from helpers import CPU, HYPER, decided
from torch import Tensor

from fastlur import _extension, backends, ops
from fastlur.operands import control_scalars, hyper_parameters

# torch's own compiler imports deprecated parts of torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DOTS = torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)
SINGLE = (torch.float32,) * 4
MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def vectors(count: int, dtypes=SINGLE) -> list[list[Tensor]]:
    """Lists of four tensors: one without elements, one whose elements are not in a row, and two that are as usual."""
    lists = [[torch.randn(7), torch.randn(5, 3).t(), torch.randn(0), torch.randn(2, 3)] for _ in range(count)]
    return [[x.to(dtype) for x, dtype in zip(each, dtypes, strict=True)] for each in lists]


def arguments(dtypes=SINGLE, empty=False) -> dict[str, list[tuple]]:
    """For every registered operation its arguments: with all operands, and with each that may be None absent."""
    control, hyper = decided()
    v = [[] for _ in range(6)] if empty else vectors(6, dtypes)
    positive, mask = [x.abs() for x in v[5]], [x > 0 for x in v[4]]
    rest = (control, hyper)
    return {
        "grad_dot": [(v[0], v[1]), (v[0], v[0])],
        "displace": [(v[0], v[1], v[2], ONE, ONE), (v[0], v[1], v[2], ONE, None)],
        "project": [(v[0], v[1], DOTS, kind) for kind in ("one_sided", "symmetric", "scissorhands")],
        "regularize": [(v[0], v[1], *two, hyper) for two in ((v[2], positive), (v[2], None), (None, None))],
        "step_control": [(control, DOTS, losses, hyper) for losses in (torch.ones(2), torch.ones(()), torch.ones(0))],
        "meta_update": [
            (v[0], v[1], v[2], v[3], positive, v[4], positive, mask, *rest),
            (v[0], v[1], None, v[3], positive, None, None, mask, *rest),
            (v[0], v[1], v[2], v[3], None, v[4], None, None, *rest),
            (v[0], v[1], None, v[3], None, None, None, None, *rest),
        ],
        "extrapolate": [(v[0], v[1], v[2], ONE / 2, ONE / 2)],
        "saliency": [(v[0], v[1], v[2]), (v[0], v[1], None)],
    }


def names_and_cases():
    return [(name, case) for name, cases in arguments().items() for case in range(len(cases))]


def check(name, given):
    with backends.backend("torch"):
        torch.library.opcheck(getattr(torch.ops.fastlur, name).default, given)


@pytest.mark.parametrize(("name", "case"), names_and_cases())
def test_a_registration_is_sound_whatever_is_absent(name, case):
    check(name, arguments()[name][case])


@pytest.mark.parametrize("name", ops.SCHEMAS)
@pytest.mark.parametrize("of", ["no tensors", "every dtype"])
def test_a_registration_is_sound_for_lists(of, name):
    check(name, arguments(MIXED, empty=of == "no tensors")[name][0])


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_the_extension_is_as_sound(name):
    reason = _extension.missing("cpu")
    if reason is not None:
        pytest.skip(reason)
    with backends.backend("extension"):
        torch.library.opcheck(getattr(torch.ops.fastlur, name).default, arguments(MIXED)[name][0])


# functions of (lists of vectors, control, hyper): what they return and what they write is compared
FUNCTIONS = {
    "grad_dot": lambda v, control, hyper: ops.grad_dot(v[0], v[1]),
    "displace": lambda v, control, hyper: ops.displace(v[0], v[1], v[2], 0.25, ops.grad_dot(v[2], v[2])[0][0] + 1),
    "project": lambda v, control, hyper: ops.project(v[0], v[1], DOTS, "symmetric"),
    "regularize": lambda v, control, hyper: ops.regularize(v[0], v[1], v[2], v[3], l2=0.5, l1=0.1, prox=0.3),
    "step_control": lambda v, control, hyper: ops.step_control(control, DOTS * 2, torch.ones(2), hyper),
    "meta_update": lambda v, control, hyper: ops.meta_update(*v[:4], control=control, hyper=hyper, theta0=v[4]),
    "extrapolate": lambda v, control, hyper: ops.extrapolate(v[0], v[1], v[2], 4.0, 0.5),
    "saliency": lambda v, control, hyper: ops.saliency(v[0], v[1], v[2]),
}


def run(function, compiler=None, dtypes=MIXED, **hyper):
    """What a function returns and everything it was given, afterwards; compiled or not."""
    torch.manual_seed(1)
    lists = vectors(8, dtypes)
    control, packed = decided(**hyper)
    go = function if compiler is None else torch.compile(function, fullgraph=True, backend=compiler)
    returned = go(lists, control, packed)
    returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return [*returned, control, packed, *(x for each in lists for x in each)]


def assert_equal(compiled, eager):
    for found, expected in zip(compiled, eager, strict=True):
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_a_function_that_uses_it_compiles_as_one_graph(name):
    torch._dynamo.reset()
    untouched, eager = run(lambda *_: None), run(FUNCTIONS[name])
    assert len(eager) > len(untouched) or not all(map(torch.equal, eager, untouched))
    assert_equal(run(FUNCTIONS[name], "aot_eager"), eager)


def trim(v, share):
    """Scores and a mask of the weights above the threshold, as the trims have it."""
    ops.saliency(v[0], v[1], v[2])
    least = ops.threshold(v[0], share)
    return least, *((x > least).sum() for x in v[0])


@pytest.mark.parametrize("share", [0, 0.29, 1.0])
def test_a_threshold_compiles_as_part_of_a_graph(share):
    torch._dynamo.reset()
    results = [run(lambda v, *_: trim(v, share), compiler, SINGLE) for compiler in (None, "aot_eager")]
    assert_equal(*results)
    for given in vectors(2):
        torch.library.opcheck(torch.ops.fastlur.threshold.default, (given, float(share)))


def test_a_threshold_at_a_share_that_is_a_tensor_is_no_part_of_a_graph():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="sparsity: is a tensor, whose value is not known while it is compiled"):
        torch.compile(lambda x: ops.threshold(x, torch.tensor(0.5)), fullgraph=True, backend="aot_eager")(torch.ones(3))


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_a_compiler_may_not_change_the_order_of_elements(name):
    """Strides would then differ between operands that lie alike, which are worked on as they lie in memory."""
    assert torch.Tag.needs_fixed_stride_order in getattr(torch.ops.fastlur, name).default.tags


def whole_step(v, control, hyper):
    """A step of the vectors, with work of torch's own before and after, such as no compiler can round differently."""
    theta, a, u, moment, point = v[0], [x * 2 for x in v[1]], v[2], v[3], v[4]
    dots, each = ops.grad_dot(a, u)
    ops.step_control(control, dots, torch.stack([x.amax() if x.numel() else x.new_zeros(()) for x in v[5]]), hyper)
    ops.meta_update(theta, a, u, moment, control=control, hyper=hyper)
    ops.displace(point, theta, u, 0.1, dots[2])
    return dots * 0.5, each, point[0] * 2


@needs_compiler
def test_a_whole_step_through_inductor_has_the_numbers_of_eager():
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch({"compile_threads": 1}):  # one process: another takes longer to start than the step to compile
        compiled = run(whole_step, "inductor", SINGLE)
    torch._dynamo.reset()
    assert_equal(compiled, run(whole_step, dtypes=SINGLE))


@pytest.mark.parametrize("count", [1, 3])
def test_compiled_steps_go_on_from_each_other(count):
    torch._dynamo.reset()
    results = []
    for compiler in (None, "aot_eager"):
        torch.manual_seed(1)
        lists = vectors(6)
        control, hyper = control_scalars(CPU), hyper_parameters(CPU, **HYPER)
        go = whole_step if compiler is None else torch.compile(whole_step, fullgraph=True, backend=compiler)
        for _ in range(count):
            go(lists, control, hyper)
        assert float(control[1]) == count
        results.append([control, *(x for each in lists for x in each)])
    assert_equal(*results)
