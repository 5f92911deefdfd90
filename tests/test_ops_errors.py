"""What every public operation refuses, how it says so, and that nothing was written when it did."""

from __future__ import annotations

import backend_cases as cases
import pytest
import torch
from helpers import decided
from torch import Tensor

import fastlur
from fastlur import ops
from fastlur.operands import control_scalars, hyper_parameters

DOTS = torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64)
# the vectors of every operation, in the order in which they are compared with the first
VECTORS = {
    "grad_dot": "a b",
    "displace": "out theta d",
    "project": "a b",
    "regularize": "grad theta theta0 fisher",
    "meta_update": "theta a u moment1 moment2 theta0 fisher mask",
    "extrapolate": "theta theta0 memorised",
    "saliency": "out grad theta",
    "threshold": "scores",
}
WRITTEN = {
    "grad_dot": "",
    "displace": "out",
    "project": "a b",
    "regularize": "grad",
    "meta_update": "theta moment1 moment2",
    "extrapolate": "theta",
    "saliency": "out",
    "threshold": "",
}
every_vector = pytest.mark.parametrize(
    ("operation", "name"), [(operation, name) for operation, names in VECTORS.items() for name in names.split()]
)
every_other_vector = pytest.mark.parametrize(
    ("operation", "name"), [(operation, name) for operation, names in VECTORS.items() for name in names.split()[1:]]
)
every_operation = pytest.mark.parametrize("operation", VECTORS)


@pytest.fixture(params=["torch", "extension"], autouse=True)
def served(request):
    with cases.through(request.param):
        yield request.param


def vectors(operation) -> dict[str, list[Tensor]]:
    found = {name: [torch.rand(7), torch.rand(3, 5)] for name in VECTORS[operation].split()}
    if "mask" in found:
        found["mask"] = [x > 0.5 for x in found["mask"]]
    return found


def scalars(operation) -> dict:
    control, hyper = decided()
    return {
        "displace": {"alpha": 0.1},
        "project": {"dots": DOTS.clone()},
        "meta_update": {"control": control, "hyper": hyper},
        "extrapolate": {"alpha": 2.0, "eta": 0.5},
        "threshold": {"sparsity": 0.5},
    }.get(operation, {})


def refused(operation, given, message, **changed):
    """Calling it is an error with this message, and every vector is as it was."""
    kept = {name: [x.clone() for x in each] for name, each in given.items()}
    with pytest.raises(fastlur.ArgumentError, match=message):
        getattr(ops, operation)(**given, **(scalars(operation) | changed))
    for name, each in given.items():
        assert all(torch.equal(x, y) for x, y in zip(each, kept[name], strict=True) if x.device.type == "cpu")


def test_every_operation_is_listed_here():
    assert set(VECTORS) == set(WRITTEN) == {*ops.SCHEMAS, "threshold"} - {"step_control"}


@every_operation
def test_what_fits_is_taken(operation):
    getattr(ops, operation)(**vectors(operation), **scalars(operation))


@every_other_vector
@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: [*x, torch.ones(2)], lambda x: []])
def test_lists_of_different_lengths(operation, name, change):
    given = vectors(operation)
    given[name] = change(given[name])
    first = VECTORS[operation].split()[0]
    refused(operation, given, rf"{name} has {len(given[name])} tensors, {first} has 2")


@every_other_vector
@pytest.mark.parametrize("shape", [(5, 3), (15,), (3, 1), (1, 3, 5), (0,)], ids=str)
def test_shapes_that_differ_even_where_they_would_broadcast(operation, name, shape):
    given = vectors(operation)
    given[name][1] = torch.ones(shape, dtype=given[name][1].dtype)
    refused(operation, given, rf"{name}\[1\] has shape .*, \w+\[1\] \(3, 5\)")


@every_other_vector
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.complex64])
def test_dtypes_that_differ(operation, name, dtype):
    given = vectors(operation)
    given[name][1] = given[name][1].to(dtype)
    wanted = "bool" if name == "mask" else "float32"
    refused(operation, given, rf"{name}\[1\] is {dtype}; it must be torch\.{wanted}")


@every_operation
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_vectors_that_are_no_real_numbers(operation, dtype):
    given = {name: [x.to(dtype) for x in each] for name, each in vectors(operation).items()}
    refused(operation, given, rf"\w+\[0\] is {dtype}; vectors are of one of float32, float64, bfloat16, float16")


@every_vector
@pytest.mark.parametrize("place", [0, 1])
def test_vectors_on_two_devices(operation, name, place):
    given = vectors(operation)
    given[name][place] = given[name][place].to("meta")
    refused(operation, given, r"\w+\[\d\] is on (cpu, \w+\[\d\] on meta|meta, \w+\[\d\] on cpu)")


@pytest.mark.parametrize(
    ("operation", "name", "value", "message"),
    [
        ("displace", "alpha", torch.ones(2), r"shape \(2,\) is no hyper-parameter"),
        ("displace", "norm2", torch.ones(3), r"shape \(3,\) is no hyper-parameter"),
        ("extrapolate", "alpha", torch.ones(0), r"shape \(0,\) is no hyper-parameter"),
        ("extrapolate", "eta", torch.ones(2, 2), r"shape \(2, 2\) is no hyper-parameter"),
        ("regularize", "l2", torch.ones(2), r"shape \(2,\) is no hyper-parameter"),
        ("project", "kind", "both", "kind='both' is no projection; use one of one_sided"),
        ("project", "dots", DOTS.float(), r"dots: is torch\.float32 of shape \(3,\); it must be float64"),
        ("project", "dots", DOTS[:2], r"dots: is torch\.float64 of shape \(2,\)"),
        ("project", "dots", DOTS[None], r"dots: is torch\.float64 of shape \(1, 3\)"),
        ("meta_update", "control", DOTS[:2], r"control: is torch\.float64 of shape \(2,\)"),
        ("meta_update", "control", DOTS.float(), r"control: is torch\.float32"),
        ("meta_update", "hyper", DOTS, r"hyper: is torch\.float64 of shape \(3,\); it must be float64 of shape \(8,\)"),
        ("meta_update", "hyper", torch.ones(8), r"hyper: is torch\.float32"),
        ("meta_update", "theta0", None, "fisher: weights a proximal term that needs theta0"),
        ("regularize", "theta0", None, "fisher: weights a proximal term that needs theta0"),
        ("threshold", "sparsity", -0.1, r"sparsity=-0\.1 must be in \[0, 1\]"),
        ("threshold", "sparsity", 1.0001, r"sparsity=1\.0001 must be in"),
        ("threshold", "sparsity", float("nan"), "sparsity=nan must be in"),
        ("threshold", "scores", [torch.ones(0)], "scores: hold nothing"),
    ],
)
def test_what_is_wrong_about_the_rest_is_named(operation, name, value, message):
    given = vectors(operation)
    given.pop(name, None)
    refused(operation, given, message, **{name: value})


@pytest.mark.parametrize("name", ["control", "dots", "hyper"])
@pytest.mark.parametrize("change", [lambda x: x.float(), lambda x: x[:-1], lambda x: x[None]])
def test_the_scalars_of_step_control(name, change):
    control, hyper = decided()
    given = {"control": control, "dots": DOTS.clone(), "hyper": hyper}
    given[name] = change(given[name])
    before = control.clone()
    with pytest.raises(fastlur.ArgumentError, match=rf"^{name}: is torch\.float\d\d of shape .* must be float64"):
        ops.step_control(losses=torch.ones(2), **given)
    assert torch.equal(control, before)


@every_operation
def test_parameters_are_taken_as_values_and_nothing_that_comes_out_is_differentiable(operation):
    """Under grad mode, leaves that require grad are written; the numbers are those of plain tensors."""
    results = []
    for wrap in (lambda x: x, torch.nn.Parameter):
        torch.manual_seed(0)
        given = {name: [x if x.dtype == torch.bool else wrap(x) for x in v] for name, v in vectors(operation).items()}
        returned = getattr(ops, operation)(**given, **scalars(operation))
        returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
        assert not any(x.requires_grad for x in returned)
        held = [x for each in given.values() for x in each]
        assert all(x.grad is None and x.is_leaf for x in held)
        results.append([x.detach() for x in held + returned])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@every_operation
def test_autograd_learns_of_every_write_and_of_no_other(operation):
    given = vectors(operation)
    before = {name: [x._version for x in each] for name, each in given.items()}
    getattr(ops, operation)(**given, **scalars(operation))
    for name, each in given.items():
        for tensor, version in zip(each, before[name], strict=True):
            assert (tensor._version > version) == (name in WRITTEN[operation].split()), name


def test_scalars_may_be_parameters_too():
    alpha = torch.nn.Parameter(torch.tensor(0.5))
    out, theta, d = torch.empty(5), torch.rand(5), torch.rand(5)
    ops.displace(out, theta, d, alpha, norm2=torch.nn.Parameter(torch.tensor(4.0)))
    torch.testing.assert_close(out, theta - 0.25 * d)
    assert not out.requires_grad and alpha.grad is None


OPTIONAL = [("regularize", "theta0"), ("regularize", "fisher"), ("saliency", "theta")]
OPTIONAL += [("meta_update", name) for name in ("u", "moment2", "theta0", "fisher", "mask")]


@every_vector
def test_nothing_where_a_vector_must_be(operation, name):
    given = vectors(operation)
    del given[name]
    if (operation, name) in OPTIONAL and name != "theta0":
        getattr(ops, operation)(**given, **{name: None}, **scalars(operation))
    elif name != "theta0" or operation == "extrapolate":
        refused(operation, given, rf"^{name}: is None; pass a tensor or a list of tensors$", **{name: None})


@every_vector
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [x[0], None], r"\[1\] is None; leave it out"),
        (lambda x: [x[0].tolist(), x[1]], r"\[0\] is a list; leave it out, or pass a tensor"),
        (lambda x: dict(enumerate(x)), r": is a dict; pass a tensor or a list of tensors, such as list\(it\.values"),
        (lambda x: 0.5, r": is a float; pass a tensor"),
        (lambda x: "ab", r": is a str; pass a tensor"),
        (lambda x: [x[0], x[1].to_sparse()], r"\[1\] is torch\.sparse_coo; call to_dense"),
    ],
)
def test_what_is_no_vector(operation, name, change, message):
    given = vectors(operation)
    changed = change(given.pop(name))
    refused(operation, given, f"^{name}{message}", **{name: changed})


@every_operation
def test_any_iterable_of_tensors_is_a_vector(operation):
    results = []
    for wrap in (list, tuple, iter, lambda x: dict(enumerate(x)).values()):
        torch.manual_seed(0)
        given = vectors(operation)
        returned = getattr(ops, operation)(**{name: wrap(x) for name, x in given.items()}, **scalars(operation))
        returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
        results.append([*returned, *(x for each in given.values() for x in each)])
    for each in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(each, results[0], strict=True))


@pytest.mark.parametrize(
    ("operation", "name"), [("project", "dots"), ("meta_update", "control"), ("meta_update", "hyper")]
)
def test_scalars_on_another_device_than_the_vectors(operation, name):
    elsewhere = {name: scalars(operation)[name].to("meta")}
    refused(
        operation, vectors(operation), rf"^{name}: is on meta, the data on cpu; move it with .to\('cpu'\)", **elsewhere
    )


@pytest.mark.parametrize("name", ["control", "dots", "hyper", "losses"])
def test_scalars_of_step_control_on_two_devices(name):
    control, hyper = decided()
    given = {"control": control, "dots": DOTS.clone(), "losses": torch.ones(2), "hyper": hyper}
    given[name] = given[name].to("meta")
    before = control.clone()
    with pytest.raises(fastlur.ArgumentError, match=r"\w+: is on (meta, control on cpu|cpu, control on meta); move it"):
        ops.step_control(**given)
    assert torch.equal(control, before)


@pytest.mark.parametrize("name", ["control", "dots", "hyper", "losses"])
def test_scalars_that_are_no_tensors(name):
    control, hyper = decided()
    given = {"control": control, "dots": DOTS.clone(), "losses": torch.ones(2), "hyper": hyper}
    with pytest.raises(fastlur.ArgumentError, match=f"^{name}: is a list; it must be a tensor"):
        ops.step_control(**given | {name: [1.0, 2.0, 3.0]})


@pytest.mark.parametrize("value", ["0.1", None, 1 + 2j, torch.ones((), dtype=torch.complex64), [0.1]], ids=repr)
@pytest.mark.parametrize(("operation", "name"), [("displace", "alpha"), ("extrapolate", "eta"), ("regularize", "l1")])
def test_what_is_no_number(operation, name, value):
    refused(operation, vectors(operation), rf"^{name}\b.* is no hyper-parameter; pass a number", **{name: value})


def test_a_number_on_another_device_that_holds_none():
    refused("displace", vectors("displace"), "^alpha: is on meta", alpha=torch.ones((), device="meta"))


def test_hyper_parameters_are_where_the_data_are_whatever_the_default_device():
    theta, moment = torch.ones(5), torch.zeros(5)
    with torch.device("meta"):
        hyper, control = hyper_parameters("cpu", lr=0.5), control_scalars("cpu")
        ops.meta_update(theta, theta.clone(), None, moment, control=control, hyper=hyper)
        value = ops.regularize(moment, theta, l2=1.0)
        empty = [ops.regularize([], []), *ops.grad_dot([], [])]
    assert {x.device.type for x in (hyper, control, value, *empty)} == {"cpu"}
    assert theta.tolist() == [0.5] * 5 and float(value) == 0.625
    assert [float(x.sum()) for x in empty] == [0.0] * 3


def test_scalars_need_not_lie_side_by_side():
    def spread(values):
        return torch.stack([values, torch.full_like(values, torch.nan)], 1)[:, 0]

    control, hyper = decided()
    results = []
    for lay in (lambda x: x, spread):
        a, b, theta, moment = ([x.clone()] for x in torch.arange(20.0).view(4, 5))
        state = lay(control.clone())
        ops.project(a, b, lay(DOTS))
        ops.step_control(state, lay(DOTS), lay(torch.ones(2).double()), lay(hyper))
        ops.meta_update(theta, a, b, moment, control=state, hyper=lay(hyper))
        results.append([*a, *b, *theta, *moment, state])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert float(results[0][-1][1]) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jvp itself imports deprecated parts of torch
@every_operation
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_a_transform_of_torch_func_is_refused(operation, transform):
    """It could not look into an operation: a gradient through one would be zero, without a word."""

    given, others = vectors(operation), scalars(operation)

    def inside(x):
        name = VECTORS[operation].split()[0]
        getattr(ops, operation)(**given | {name: [x, given[name][1]]}, **others)
        return x.sum()

    x = torch.ones(7)
    calls = {
        "grad": lambda: torch.func.grad(inside)(x),
        "jvp": lambda: torch.func.jvp(inside, (x,), (x,)),
        "vmap": lambda: torch.vmap(inside)(torch.ones(2, 7)),
    }
    with pytest.raises(fastlur.ArgumentError, match=r"torch\.func transform.*outside of it"):
        calls[transform]()


@every_operation
def test_tensors_of_inference_mode_are_written_inside_it_and_nowhere_else(operation):
    with torch.inference_mode():
        inside = vectors(operation)
        getattr(ops, operation)(**inside, **scalars(operation))
    if not WRITTEN[operation]:
        getattr(ops, operation)(**inside, **scalars(operation))
        return
    refused(operation, inside, rf"^{operation}: a tensor that it writes was made in inference mode; .* clone")
    outside = vectors(operation)
    getattr(ops, operation)(
        **outside | {n: inside[n] for n in outside if n not in WRITTEN[operation].split()}, **scalars(operation)
    )


@every_operation
def test_plain_tensors_may_be_written_in_inference_mode(operation):
    given = vectors(operation)
    results = []
    for mode in (False, True):
        copies = {name: [x.clone() for x in each] for name, each in given.items()}
        held = scalars(operation)
        with torch.inference_mode(mode):
            getattr(ops, operation)(**copies, **held)
        results.append([x for each in copies.values() for x in each])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
