"""It works on an MLP, a residual CNN, a transformer with fused attention, with dropout, and with tied embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from building import needs_compiler
from helpers import MODES, Attention, blobs, direction, images, minus, mlp, norm, same, state
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fastlur
from fastlur.demo import residual_cnn
from fastlur.losses import BoundedForgetting, cross_entropy, negative_cross_entropy

GRADIENT = pytest.mark.parametrize("gradient", MODES)


def sentences(n):
    tokens = torch.randint(0, 11, (n, 7))
    return tokens[:, :-1], tokens[:, 1:]


class Classifier(nn.Module):
    """A transformer encoder layer of torch's own, with dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer(self.embed(x).unsqueeze(1).expand(-1, 3, -1)).mean(1))


MODELS = {
    "mlp": (mlp, blobs),
    "residual cnn": (lambda: residual_cnn(width=4), images),
    "tied attention": (Attention, sentences),
    "transformer layer with dropout": (Classifier, blobs),
    "mlp with dropout": (lambda: mlp(dropout=0.5), blobs),
}


@GRADIENT
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_runs_forgets_and_keeps_everything_finite(name, gradient, optimizer):
    make, data = MODELS[name]
    model = make()
    before = state(model)
    forget, retain = data(16), data(32)
    result = fastlur.unlearn(
        model,
        forget,
        retain,
        method=fastlur.LUR(gradient=gradient, forget_weight=1.0),
        steps=12,
        batch_size=16,
        schedule="constant",
        lr=0.05 if optimizer == "sgd" else 0.01,
        optimizer=optimizer,
        progress=False,
    )
    assert not same(before, state(model))
    assert all(bool(torch.isfinite(v).all()) for v in state(model).values())
    assert result.history["forget_loss"][-1] < result.history["forget_loss"][0]
    assert all(-1 <= c <= 1 for c in result.history["cosine"])


@pytest.mark.parametrize("gradient", ["secant", "optimistic", "first_order"])
def test_attention_stays_fused_where_nothing_is_differentiated_twice(gradient):
    """Forbidding the plain algorithm proves that the fused one served."""
    model = Attention()
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        fastlur.MetaStep(model, forget_loss=negative_cross_entropy, gradient=gradient) as step,
    ):
        step(sentences(4), sentences(4))


def test_fused_attention_cannot_be_differentiated_twice_so_exact_leaves_it():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        (g,) = torch.autograd.grad(scaled_dot_product_attention(q, q, q).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative"):
            torch.autograd.grad(g.sum(), q)
    model = Attention()
    with fastlur.MetaStep(model, gradient="exact") as step:
        step(sentences(4), sentences(4))


@pytest.mark.parametrize("order", ["retain_first", "forget_first"])
def test_exact_equals_secant_on_attention_at_small_steps(order):
    model = Attention().double()
    data = sentences(6), sentences(6)
    found = {}
    for gradient in ("exact", "secant", "first_order"):
        with fastlur.MetaStep(
            copy.deepcopy(model), lr=0.0, gradient=gradient, inner_lr=1e-3, order=order, forget_weight=0.5
        ) as step:
            step(*data)
            found[gradient] = direction(step)
    part = norm(minus(found["first_order"], found["exact"]))
    assert norm(minus(found["secant"], found["exact"])) < 0.01 * part


def test_two_passes_of_one_loss_see_one_dropout_mask():
    """With the same mask, secant at α → 0 is the gradient of one function: twice the same inner gradient."""
    model = mlp(dropout=0.5, dtype=torch.float64)
    x, y = blobs(32, dtype=torch.float64)
    seen = []

    def loss(m, batch):
        value = cross_entropy(m, batch)
        seen.append(float(value.detach()))
        return value

    with fastlur.MetaStep(model, loss, cross_entropy, lr=0.0, gradient="secant", inner_lr=0.0) as step:
        step((x, y), (x, y))
        first = direction(step)
        step((x, y), (x, y))
        second = direction(step)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0] != seen[2]
    assert norm(minus(first, second)) > 1e-3 * norm(first)


def test_dropout_under_exact_matches_secant():
    model = mlp(dropout=0.4, dtype=torch.float64)
    data = blobs(32, dtype=torch.float64), blobs(32, dtype=torch.float64)
    found = {}
    for gradient in ("exact", "secant", "first_order"):
        with fastlur.MetaStep(copy.deepcopy(model), lr=0.0, gradient=gradient, inner_lr=1e-3) as step:
            step(*data)
            found[gradient] = direction(step)
    part = norm(minus(found["first_order"], found["exact"]))
    assert norm(minus(found["secant"], found["exact"])) < 0.01 * part


class TestForgetLoss:
    def test_bounded_is_plain_below_the_cap_and_still_at_it(self):
        model = mlp()
        batch = blobs(20)
        plain, bounded = negative_cross_entropy(model, batch), BoundedForgetting()(model, batch)
        assert torch.equal(plain, bounded)
        tight = BoundedForgetting(cap=0.5)(model, batch)
        assert float(tight.detach()) == -0.5
        gradients = torch.autograd.grad(tight, list(model.parameters()))
        assert all(bool((g == 0).all()) for g in gradients)

    def test_the_cap_grows_with_the_classes(self):
        wide = nn.Linear(6, 1000)
        torch.nn.init.constant_(wide.weight, 0)
        x, y = blobs(4)
        wide.bias.data.fill_(0)
        wide.bias.data[:4] = -100.0
        assert float(BoundedForgetting()(wide, (x, y)).detach()) == pytest.approx(-(6.9078 + 10), abs=1e-3)

    def test_a_nan_is_not_hidden_by_the_cap(self):
        model = mlp()
        x, y = blobs(4)
        assert torch.isnan(BoundedForgetting()(model, (x * float("nan"), y)))

    @pytest.mark.parametrize("cap", [0, -1.0, float("inf"), float("nan")])
    def test_a_bad_cap_is_refused(self, cap):
        with pytest.raises(fastlur.ArgumentError, match="cap="):
            BoundedForgetting(cap)

    def test_unbounded_ascent_ruins_what_bounded_ascent_keeps(self):
        """Forget and retain overlap in the input space; ascent without end drags the retained items along."""
        torch.manual_seed(1)
        centres = torch.randn(4, 6) * 1.2
        y = torch.arange(400) % 4
        x = centres[y] + torch.randn(400, 6)
        gone = torch.arange(400) % 10 == 0
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        kept = {}
        for name, loss in {"plain": negative_cross_entropy, "bounded": BoundedForgetting()}.items():
            copied = copy.deepcopy(model)
            fastlur.unlearn(
                copied,
                (x[gone], y[gone]),
                (x[~gone], y[~gone]),
                forget_loss=loss,
                method=fastlur.LUR(forget_weight=1.0),
                schedule="constant",
                lr=0.1,
                steps=200,
                progress=False,
            )
            kept[name] = float((copied(x[~gone]).argmax(1) == y[~gone]).float().mean())
        assert kept["bounded"] > kept["plain"] + 0.05


class TestPrecision:
    def test_bf16_passes_compute_in_bf16_and_fp32_ones_do_not(self):
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            seen = set()

            def loss(model, batch, seen=seen):
                output = model(batch[0])
                seen.add(output.dtype)
                return output.float().square().mean()

            with fastlur.MetaStep(mlp(), loss, loss, gradient="secant", precision=precision) as step:
                step(blobs(4), blobs(4))
            assert seen == {dtype}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_models_of_half_precision_run(self, dtype):
        model = mlp().to(dtype)
        x, y = blobs(16)
        result = fastlur.unlearn(model, (x.to(dtype), y), (x.to(dtype) + 1, y), steps=3, progress=False)
        assert all(p.dtype == dtype for p in model.parameters())
        assert len(result.history["step"]) == 3

    def test_bf16_runs_with_parameters_kept(self):
        model = residual_cnn(width=4)
        fastlur.unlearn(model, images(8), images(16), precision="bf16", steps=3, progress=False)
        assert all(p.dtype == torch.float32 for p in model.parameters())

    def test_the_default_inner_step_survives_bf16(self):
        """The alignment part of the direction must not drown in rounding: cosine to fp32 of at least 0.7."""
        parts = {}
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        data = blobs(64), blobs(64)
        for precision in ("fp32", "bf16"):
            for inner_lr in (None, 0.0):
                method = {"inner_lr": inner_lr}
                with fastlur.MetaStep(
                    copy.deepcopy(model), lr=0.0, gradient="secant", precision=precision, **method
                ) as step:
                    step(*data)
                    parts[precision, inner_lr] = torch.cat([v.flatten() for v in direction(step).values()])
        part = {p: parts[p, None] - parts[p, 0.0] for p in ("fp32", "bf16")}
        assert float(nn.functional.cosine_similarity(part["fp32"], part["bf16"], dim=0)) >= 0.7


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler imports deprecated parts of torch
def test_compiled_forward_gives_the_same_run():
    compiled = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            compiled.append(torch.compiler.is_compiling())
            return self.body(x)

    model, data = Counting(), (blobs(16), blobs(16))
    plain = copy.deepcopy(model)
    fastlur.unlearn(plain, *data, steps=2, progress=False)
    fastlur.unlearn(model, *data, steps=2, progress=False, compile=True)
    assert any(compiled)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_forward_gives_the_same_steps():
    model = mlp()
    data = blobs(16), blobs(16)
    found = []
    for compiled in (False, True):
        copied = copy.deepcopy(model)
        with fastlur.MetaStep(copied, gradient="secant", inner_lr=0.5, compile=compiled) as step:
            for _ in range(3):
                step(*data)
        found.append(state(copied))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("gradient", ["optimistic", "exact"])
def test_compiled_forward_gives_the_same_steps_with_convolutions_and_batch_norm(gradient):
    """Weights and statistics alike, though a compiled forward sees them at displaced points by turns."""
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10)]
    model = nn.Sequential(*layers).double()
    batches = [tuple((x.double(), y) for x, y in (images(8), images(8))) for _ in range(3)]
    found = []
    for compiled in (False, True):
        copied = copy.deepcopy(model)
        with fastlur.MetaStep(copied, gradient=gradient, inner_lr=0.5, compile=compiled) as step:
            for forget, retain in batches:
                step(forget, retain)
        found.append(state(copied))
    assert int(found[1]["1.num_batches_tracked"]) == 3
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-12, atol=1e-12)
