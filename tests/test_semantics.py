"""What every backend agrees on where things are not ordinary: absent penalties, one-sided conflicts, unequal lists."""

import pytest
import torch
from kernel_cases import CUDA, DEVICE, kernels, number

from fastlur import _extension, backends, ops, reference

# the interpreter computes with NumPy, which warns of the infinities that are meant here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")


def extension():
    reason = _extension.missing(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return _extension


BACKENDS = {"torch": lambda: reference, "triton": lambda: kernels, "extension": extension}


@pytest.fixture(params=BACKENDS)
def serve(request):
    return BACKENDS[request.param]()


def vector(*values):
    return [torch.tensor(values, dtype=torch.float32, device=DEVICE)]


def hyper(lr=0.0, momentum=0.0, beta2=0.0, eps=1e-8, decay=0.0, l1=0.0, prox=0.0, clip=0.0):
    values = [lr, momentum, beta2, eps, decay, l1, prox, clip]
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def control():
    return torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, device=DEVICE)


WITHOUT = [{"l1": 0.5, "prox": 0.5}, {"decay": 0.5, "prox": 0.5}, {"decay": 0.5, "l1": 0.5}]


class TestAbsentPenalties:
    def test_add_nothing_to_a_gradient_even_where_a_weight_is_infinite(self, serve):
        grad = vector(1.0, 2.0, 3.0)
        value = serve.regularize(grad, vector(INF, -INF, NAN), vector(INF, 0.0, NAN), vector(INF, NAN, 0.0), hyper())
        assert grad[0].tolist() == [1.0, 2.0, 3.0]
        assert float(value) == 0.0

    @pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
    def test_add_nothing_to_the_momentum_of_an_infinite_weight(self, serve, adam):
        theta, first, second = vector(INF, 1.0), vector(0.0, 0.0), vector(0.0, 0.0)
        serve.meta_update(
            theta,
            vector(1.0, 1.0),
            None,
            first,
            second if adam else None,
            vector(INF, NAN),
            vector(INF, INF),
            None,
            control(),
            hyper(),
        )
        assert first[0].tolist() == [1.0, 1.0]
        assert theta[0].tolist() == [INF, 1.0]

    @pytest.mark.parametrize(
        ("present", "gradient"),
        [({"decay": 0.5}, 1.0), ({"l1": 0.5}, 0.5), ({"prox": 0.5}, 0.5)],
        ids=["l2", "l1", "prox"],
    )
    def test_leave_a_present_one_alone(self, serve, present, gradient):
        grad = vector(0.0)
        serve.regularize(grad, vector(2.0), vector(1.0), vector(1.0), hyper(**present))
        assert grad[0].tolist() == [gradient]

    def test_a_present_one_shows_what_is_not_finite(self, serve):
        grad = vector(0.0)
        serve.regularize(grad, vector(INF), None, None, hyper(decay=0.5))
        assert grad[0].tolist() == [INF]


class TestSymmetricProjection:
    def test_a_vector_whose_factor_is_zero_does_not_change(self, serve):
        """‖b‖ = 0: nothing can be taken from a along b, whatever b holds elsewhere."""
        a, b = vector(1.0, -1.0), vector(INF, 0.0)
        dots = torch.tensor([-1.0, 2.0, 0.0], dtype=torch.float64, device=DEVICE)
        serve.project(a, b, dots, "symmetric")
        assert a[0].tolist() == [1.0, -1.0]
        assert b[0].tolist() == [INF, -0.5]

    def test_both_change_by_the_values_given(self, serve):
        a, b = vector(1.0, 0.0), vector(-1.0, 1.0)
        dots = torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64, device=DEVICE)
        serve.project(a, b, dots, "symmetric")
        assert a[0].tolist() == [0.5, 0.5]
        assert b[0].tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("kind", reference.PROJECTIONS)
    def test_without_conflict_nothing_changes(self, serve, kind):
        a, b = vector(INF, 1.0), vector(1.0, NAN)
        dots = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
        serve.project(a, b, dots, kind)
        assert a[0].tolist() == [INF, 1.0]
        assert b[0][0] == 1.0 and b[0][1].isnan()


class TestRoundedFactors:
    @pytest.mark.parametrize("kind", ["one_sided", "symmetric"])
    def test_one_that_rounds_to_nothing_changes_nothing_not_even_beside_an_infinity(self, serve, kind):
        """10⁻⁵⁰ is a number in float64, in which factors are worked out, and 0 in float32."""
        a, b = vector(INF, 1.0, NAN), vector(1.0, -INF, 2.0)
        dots = torch.tensor([-1e-50, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
        serve.project(a, b, dots, kind)
        assert a[0].tolist()[:2] == [INF, 1.0] and a[0][2].isnan()
        assert b[0].tolist() == [1.0, -INF, 2.0]

    def test_in_float64_it_counts(self, serve):
        a, b = ([torch.tensor(values, dtype=torch.float64, device=DEVICE)] for values in ([1e50], [0.5]))
        serve.project(a, b, torch.tensor([-1e-50, 1.0, 1.0], dtype=torch.float64, device=DEVICE), "one_sided")
        assert b[0].tolist() == [1.5]


class TestFirstStep:
    def test_adamw_before_any_step_was_counted_corrects_as_in_the_first(self, serve):
        found = []
        for count in (0.0, 1.0):
            theta, first, second = vector(1.0, -2.0), vector(0.0, 0.0), vector(0.0, 0.0)
            state = torch.tensor([1.0, count, 1.0], dtype=torch.float64, device=DEVICE)
            settings = hyper(lr=0.1, momentum=0.9, beta2=0.99)
            serve.meta_update(theta, vector(0.5, -3.0), None, first, second, None, None, None, state, settings)
            found.append([*theta, *first, *second])
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
        # the first step of AdamW goes a whole lr along the sign
        torch.testing.assert_close(found[0][0], vector(0.9, -1.9)[0])


class TestLimitsOfSingleSums:
    def test_a_gradient_whose_square_is_no_float32_number_stops_the_step(self, serve):
        gradient, state = vector(1e20, 1.0), control()
        dots, _ = serve.grad_dot(gradient, gradient)
        assert dots.tolist() == [INF] * 3
        serve.step_control(state, dots, number(1.0), hyper())
        assert float(state[0]) == 0
        out = vector(0.0, 0.0)
        serve.displace(out, vector(1.0, 2.0), gradient, number(0.1), dots[1])
        assert out[0].tolist() == [1.0, 2.0]

    def test_one_whose_square_is_too_small_for_it_has_no_length(self, serve):
        gradient = vector(1e-23, 1e-23)
        dots, _ = serve.grad_dot(gradient, gradient)
        assert dots.tolist() == [0.0] * 3
        out = vector(0.0, 0.0)
        serve.displace(out, vector(1.0, 2.0), gradient, number(0.1), dots[1])
        assert out[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("backend", ["torch", "extension"])
def test_lists_of_different_lengths_are_refused_below_the_public_functions_too(backend):
    BACKENDS[backend]()
    x = vector(1.0)
    alpha = number(1.0)
    with backends.backend(backend):
        for given in (([], x), (x, [])):
            with pytest.raises(Exception, match=r"tensors"):
                torch.ops.fastlur.grad_dot(*given)
        with pytest.raises(Exception, match=r"tensors"):
            torch.ops.fastlur.displace(x, x, x * 2, alpha, None)


@pytest.mark.parametrize("place", [1, 3, 5])
def test_the_deterministic_threshold_is_the_other_one(place):
    values = torch.tensor([3.0, -1.0, NAN, 2.0, 2.0])
    torch.testing.assert_close(
        reference.smallest(values, place, True), reference.smallest(values, place, False), equal_nan=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_may_have_float32_moments(backend, dtype):
    if backend == "triton" and not CUDA:
        pytest.skip("the dispatcher gives CPU tensors to the others; the launchers' tests cover mixed dtypes")
    BACKENDS[backend]()
    torch.manual_seed(0)
    theta, a, first = torch.randn(1000, device=DEVICE).to(dtype), torch.randn(1000, device=DEVICE).to(dtype), None
    first = torch.randn(1000, device=DEVICE)
    expected = 0.9 * first.double() + a.double()
    moved = theta.double() - 0.1 * expected
    with backends.backend(backend):
        ops.meta_update(theta, a, None, first, control=control(), hyper=hyper(lr=0.1, momentum=0.9))
    torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theta.double(), moved, rtol=torch.finfo(dtype).eps, atol=1e-6)
