"""What every backend must agree on where plain arithmetic would not: infinities, wide moments, lists that do not fit.

All three run through `fastlur.ops`, without a GPU on CPU tensors: the kernels then in Triton's interpreter, plain torch
also the way it goes on a GPU, where no scalar may be looked at.
"""

import pytest
import torch
from backend_cases import BACKENDS, DEVICE, through

import fastlur
from fastlur import _extension, ops, reference
from fastlur.operands import control_scalars, hyper_parameters

INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy, at 0·∞


@pytest.fixture(params=BACKENDS)
def served(request):
    with through(request.param):
        yield request.param


@pytest.fixture(params=[*BACKENDS, "torch, blind"])
def everyone(request, monkeypatch):
    if request.param == "torch, blind":
        monkeypatch.setattr(reference, "host", lambda value: None)
    with through(request.param.split(",")[0]):
        yield request.param


def tensor(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


# l2, l1 and prox of which some are 0; θ and θ₀ with what such a factor must not touch; the gradient and the value
@pytest.mark.parametrize(
    ("factors", "theta", "theta0", "gradient", "value"),
    [
        ({}, (INF, 2.0, NAN), (1.0, -INF, NAN), (0.0, 0.0, 0.0), 0.0),
        ({"l2": 0.5}, (2.0, 4.0, 1.0), (INF, NAN, -INF), (1.0, 2.0, 0.5), 5.25),
        ({"l1": 0.5}, (INF, -2.0, 0.0), (INF, NAN, 1.0), (0.5, -0.5, 0.0), INF),
        ({"prox": 0.5}, (2.0, 4.0, -INF), (0.0, 0.0, 0.0), (1.0, 2.0, -INF), INF),
    ],
)
@pytest.mark.parametrize("weighted", [True, False])
def test_an_absent_penalty_adds_nothing_even_to_infinities(everyone, factors, theta, theta0, gradient, value, weighted):
    weights, anchor, one = tensor(*theta), tensor(*theta0), tensor(1.0, 1.0, 1.0)
    fisher = one if weighted else None
    grad = torch.zeros(3, device=DEVICE)
    found = ops.regularize(grad, weights, anchor, fisher, **factors)
    assert torch.equal(grad, tensor(*gradient))
    assert float(found) == value
    control = control_scalars(DEVICE)
    named = {"weight_decay" if name == "l2" else name: factor for name, factor in factors.items()}
    hyper = hyper_parameters(DEVICE, lr=0.0, momentum=0.0, **named)
    moment, moved = torch.zeros(3, device=DEVICE), weights.clone()
    ops.meta_update(moved, one, None, moment, control=control, hyper=hyper, theta0=anchor, fisher=fisher)
    assert torch.equal(moment, 1 + tensor(*gradient))


def test_adamw_without_decay_leaves_an_infinite_weight_as_it_is(everyone):
    theta, a, m1, m2 = tensor(INF, -INF, 1.0), tensor(1.0, 1.0, 1.0), tensor(0.0, 0.0, 0.0), tensor(0.0, 0.0, 0.0)
    control, hyper = control_scalars(DEVICE), hyper_parameters(DEVICE, lr=0.5, momentum=0.9)
    control[1] = 1
    ops.meta_update(theta, a, None, m1, m2, control=control, hyper=hyper)
    torch.testing.assert_close(theta, tensor(INF, -INF, 0.5))
    torch.testing.assert_close(m1, tensor(0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("dots", "a_after", "b_after"),
    [
        ((-1.0, 0.0, 1.0), "moved", (INF, 2.0)),  # t = 0: b stays, the infinity in a where it is
        ((-1.0, 1.0, 0.0), (1.0, -INF), "moved"),  # s = 0: a stays
        ((1.0, 1.0, 1.0), (1.0, -INF), (INF, 2.0)),
    ],
)
def test_a_vector_whose_factor_is_zero_stays_as_it_is(everyone, dots, a_after, b_after):
    a, b = tensor(1.0, -INF), tensor(INF, 2.0)
    ops.project(a, b, tensor(*dots, dtype=torch.float64), "symmetric")
    for vector, after, moved in ((a, a_after, (INF, -INF)), (b, b_after, (INF, -INF))):
        assert vector.tolist() == list(moved if after == "moved" else after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adamw", [False, True])
def test_moments_may_be_float32_beside_half_weights(everyone, dtype, adamw):
    sizes = (7, 1025, 0, 64)
    theta, a, u, m1, m2, theta0, fisher = ([torch.randn(n, device=DEVICE) for n in sizes] for _ in range(7))
    theta, a, u, theta0 = ([x.to(dtype) for x in each] for each in (theta, a, u, theta0))
    m2, fisher = [x.square() for x in m2], [x.abs().to(dtype) for x in fisher]
    mask = [torch.rand(n, device=DEVICE) > 0.3 for n in sizes]
    control, hyper = control_scalars(DEVICE), hyper_parameters(DEVICE, lr=0.1, momentum=0.9, weight_decay=0.5, prox=0.2)
    control[1:] = tensor(3.0, 0.5, dtype=torch.float64)
    second = m2 if adamw else None
    exact = [[x.double() for x in each] for each in (theta, a, u, m1, m2, theta0, fisher)]
    before = [x.clone() for x in m1]
    truth = [*exact[:4], exact[4] if adamw else None, *exact[5:], mask, control, hyper]
    reference.meta_update(*truth)
    ops.meta_update(theta, a, u, m1, second, control=control, hyper=hyper, theta0=theta0, fisher=fisher, mask=mask)
    eps = torch.finfo(dtype).eps
    for i in range(len(sizes)):
        assert m1[i].dtype == torch.float32
        # the moments to float32's digits, which half moments would not have
        torch.testing.assert_close(m1[i].double(), exact[3][i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theta[i].double(), exact[0][i], rtol=eps, atol=1e-5)
        assert torch.equal(m1[i][~mask[i]], before[i][~mask[i]])
        if adamw:
            torch.testing.assert_close(m2[i].double(), exact[4][i], rtol=1e-5, atol=1e-5)


def test_moments_are_refused_that_fit_neither_the_weights_nor_each_other():
    theta, a = torch.zeros(2, 5, dtype=torch.bfloat16)
    control, hyper = control_scalars("cpu"), hyper_parameters("cpu")
    for first, second, said in (
        (torch.float64, None, r"moment1\[0\] is torch.float64; it must be torch.bfloat16"),
        (torch.float32, torch.bfloat16, r"moment2\[0\] is torch.bfloat16; it must be torch.float32"),
        (torch.bfloat16, torch.float32, r"moment2\[0\] is torch.float32; it must be torch.bfloat16"),
    ):
        m1 = torch.zeros(5, dtype=first)
        m2 = None if second is None else torch.zeros(5, dtype=second)
        with pytest.raises(fastlur.ArgumentError, match=said):
            ops.meta_update(theta, a, None, m1, m2, control=control, hyper=hyper)


X = torch.zeros(3)
NUMBER = torch.zeros((), dtype=torch.float64)
UNEVEN = {
    "grad_dot": [([], [X]), ([X], []), ([X], [X, X])],
    "displace": [([], [X], [X], NUMBER, None), ([X], [X, X], [X], NUMBER, None), ([X], [X], [], NUMBER, None)],
    "project": [([], [X], NUMBER.expand(3).clone(), "symmetric"), ([X, X], [X], NUMBER.expand(3).clone(), "one_sided")],
    "regularize": [([X], [], None, None, hyper_parameters("cpu")), ([X], [X], [X, X], None, hyper_parameters("cpu"))],
    "meta_update": [
        ([X], [X, X], None, [X], None, None, None, None, control_scalars("cpu"), hyper_parameters("cpu")),
        ([X], [X], None, [], None, None, None, None, control_scalars("cpu"), hyper_parameters("cpu")),
        ([X], [X], None, [X], [X], None, None, [X > 0, X > 0], control_scalars("cpu"), hyper_parameters("cpu")),
    ],
    "extrapolate": [([], [X], [X], NUMBER, NUMBER), ([X], [X], [X, X], NUMBER, NUMBER)],
    "saliency": [([], [X], None), ([X], [X], [])],
}


@pytest.mark.parametrize("name", UNEVEN)
def test_lists_of_different_lengths_are_refused_below_the_checked_functions_too(served, name):
    for arguments in UNEVEN[name]:
        with pytest.raises(fastlur.ArgumentError, match=r"\w+ has \d tensors, \w+ has \d"):
            getattr(torch.ops.fastlur, name)(*arguments)


@pytest.mark.skipif(_extension.missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("name", UNEVEN)
def test_the_extension_refuses_them_by_itself(name):
    for arguments in UNEVEN[name]:
        with pytest.raises(RuntimeError, match=r"has \d tensors"):
            getattr(torch.ops.fastlur_ext, name)(*arguments)


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at CPU tensors")
def test_plain_torch_refuses_them_by_itself():
    for name, cases in UNEVEN.items():
        for arguments in cases:
            if name != "grad_dot":
                with pytest.raises(ValueError, match="they go place by place"):
                    getattr(reference, name)(*arguments)


def test_a_threshold_found_by_sorting_is_the_same():
    values = torch.tensor([5.0, 1.0, NAN, 1.0, -INF, 3.0])
    for place in range(1, 7):
        found = [reference.smallest(values, place, by_sorting) for by_sorting in (False, True)]
        torch.testing.assert_close(*found, equal_nan=True, rtol=0, atol=0)


def test_a_deterministic_threshold_on_cuda_does_not_use_what_has_no_deterministic_form(monkeypatch):
    def refuse(*_):
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")

    monkeypatch.setattr(torch.Tensor, "kthvalue", refuse)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert float(reference.threshold([torch.arange(10.0)], 0.3)) == 2.0
