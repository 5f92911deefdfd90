"""Steps and whole runs where the model lives: on a GPU if there is one, else the same statements on the CPU."""

import copy

import pytest
import torch
from helpers import HYPER, MODES, Attention, Interrupted, Point, direction, interrupt, state
from torch import nn

import fastlur
from fastlur.demo import residual_cnn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def images(n, size=8):
    return torch.rand(n, 1, size, size, device=DEVICE), torch.randint(0, 10, (n,), device=DEVICE)


def network():
    return residual_cnn(width=4).to(DEVICE)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def unlearned(model, forget, retain, **options):
    options = {"steps": 6, "batch_size": 8, "progress": False, "deterministic": True} | options
    return fastlur.unlearn(model, forget, retain, **options)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("gradient", MODES)
def test_every_gradient_is_its_closed_form(gradient, relative):
    """A = ½xᵀPx − pᵀx and B likewise: the direction is a + u − αPu, first order a + u; three steps for the kept one."""
    n, rho = 70_001, 0.3  # diagonal, more than one block of a kernel, in float64
    x, p, q, P, Q = torch.rand(5, n, dtype=torch.float64, device=DEVICE) + 0.5
    model = Point(x)
    d = P * x - p
    expected = []
    for _ in range(3):
        before = d if gradient == "optimistic" else P * x - p
        alpha = rho / before.norm() if relative else rho
        u = Q * (x - alpha * before) - q
        d = P * (x - alpha * u) - p
        expected.append(P * x - p + u if gradient == "first_order" else d + u)
    with fastlur.MetaStep(
        model,
        lambda m, _: (m() * P * m()).sum() / 2 - (p * m()).sum(),
        lambda m, _: (m() * Q * m()).sum() / 2 - (q * m()).sum(),
        lr=0.0,
        gradient=gradient,
        inner_lr=rho,
        relative_inner_lr=relative,
    ) as step:
        for wanted in expected:
            step(None, None)
            torch.testing.assert_close(direction(step)["x"], wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gradient", MODES)
def test_a_step_of_a_network_is_that_of_the_cpu_in_float64(gradient):
    model = residual_cnn(width=4).double()
    forget, retain = (torch.rand(2, 6, 1, 8, 8, dtype=torch.float64), torch.randint(0, 10, (2, 6)))
    found = []
    for where in (torch.device("cpu"), DEVICE):
        made = copy.deepcopy(model).to(where)
        batches = [(forget[i].to(where), retain[i].to(where)) for i in range(2)]
        with fastlur.MetaStep(made, gradient=gradient, lr=0.1, max_grad_norm=0.5, weight_decay=0.1) as step:
            for _ in range(3):
                step(*batches)
        found.append({name: value.cpu() for name, value in state(made).items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_model_leaves_as_it_came(optimizer):
    model = Attention().to(DEVICE)
    model.mix.weight.requires_grad_(False)
    model.norm.eval()
    kept = model.mix.weight.detach().clone()
    objects = dict(model.named_parameters())
    tokens = torch.randint(0, 11, (16, 6), device=DEVICE)
    data = (tokens[:8], tokens[:8].roll(1, 1)), (tokens[8:], tokens[8:].roll(1, 1))

    def loss(m, batch):
        return nn.functional.cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten())

    def go(m, batch):
        return -0.01 * loss(m, batch)

    generator = torch.cuda.get_rng_state() if CUDA else torch.get_rng_state()
    unlearned(model, *data, optimizer=optimizer, loss=loss, forget_loss=go, allow_overlap=True, deterministic=False)
    now = dict(model.named_parameters())
    assert all(now[name] is objects[name] for name in objects)
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in now.values())
    assert model.out.weight is model.embed.weight
    assert torch.equal(model.mix.weight, kept) and not model.mix.weight.requires_grad
    assert all(p.grad is None and p.device.type == DEVICE.type for p in now.values())
    assert model.training and not model.norm.training
    assert torch.equal(torch.cuda.get_rng_state() if CUDA else torch.get_rng_state(), generator)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lur", "scissorhands"])
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, method, precision):
    model, forget, retain = network(), images(24), images(40)
    options = {"method": method, "precision": precision}
    whole, broken = copy.deepcopy(model), copy.deepcopy(model)
    unlearned(whole, forget, retain, **options)
    options |= {"checkpoint": tmp_path / "kept", "checkpoint_every": 1}
    with pytest.raises(Interrupted):
        unlearned(broken, forget, retain, callbacks=[interrupt], **options)
    resumed = copy.deepcopy(model)
    unlearned(resumed, forget, retain, **options)
    assert same(state(resumed), state(whole))
    assert not same(state(whole), state(model))


def test_the_same_seed_gives_the_same_bits():
    model, forget, retain = network(), images(24), images(40)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    unlearned(first, forget, retain)
    unlearned(second, forget, retain)
    assert same(state(first), state(second))


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_step():
    model, batch = network(), images(8)
    step = fastlur.MetaStep(model, loss=lambda m, b: fastlur.losses.cross_entropy(m, b[0]) * b[1], momentum=0.9)
    step(batch, (batch, 1.0))
    good = state(model)

    def go_on():
        for _ in range(40):  # on a GPU the host looks every 32 steps
            step(batch, (batch, float("inf")))

    with pytest.raises(fastlur.NonFiniteError, match="step 2"):
        go_on()
    assert same(state(model), good)
    step.close()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gradient", MODES)
def test_no_step_waits_for_the_device(gradient, precision, optimizer):
    forget, retain = images(8), images(8)
    with fastlur.MetaStep(
        network(), gradient=gradient, precision=precision, optimizer=optimizer, max_grad_norm=HYPER["clip"]
    ) as step:
        for _ in range(3):
            step(forget, retain)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                step(forget, retain)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.gpu
def test_a_step_takes_no_more_memory_than_one_copy_of_the_parameters_beyond_its_gradients():
    """Parameters, momentum, two gradients and the displaced point: five; another half for what autograd holds."""
    layers = [nn.Linear(4096, 4096, bias=False, device=DEVICE) for _ in range(8)]
    model = nn.Sequential(*layers, nn.Linear(4096, 10, device=DEVICE))
    batch = torch.rand(4, 4096, device=DEVICE), torch.randint(0, 10, (4,), device=DEVICE)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before = torch.cuda.memory_allocated() - size
    torch.cuda.reset_peak_memory_stats()
    with fastlur.MetaStep(model) as step:
        for _ in range(3):
            step(batch, batch)
        assert torch.cuda.max_memory_allocated() - before <= 5.5 * size
