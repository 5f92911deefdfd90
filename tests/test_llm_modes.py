"""LUR on a language model: all four gradients, fused attention, checkpointing, parts, bf16, tied embeddings."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import MODES, direction, minus, norm, same, state
from lm import llama, text
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity

import fastlur
from fastlur import losses, targets
from fastlur.errors import ArgumentError, ModelError
from fastlur.llm import RMU, Collapse, ReferenceKL

FORGET, RETAIN = text(8, 1), text(8, 2)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the name that checkpointing has had for years


def taken(model, steps=1, gradient="optimistic", forgetting=None, **options):
    """The direction of the last of some steps."""
    forgetting = forgetting or losses.BoundedForgetting(per_target=True)
    options = {"lr": 0.0, "inner_lr": 1e-2} | options
    step = fastlur.MetaStep(model, None, forgetting, gradient=gradient, **options)
    for _ in range(steps):
        step(FORGET, RETAIN)
    found = direction(step)
    step.close()
    return found


def run(model, **options):
    options = {"steps": 3, "batch_size": 4, "progress": False, "lr": 0.05} | options
    return fastlur.unlearn(model, FORGET, RETAIN, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gradient", MODES)
def test_every_gradient_works_with_fused_attention_on(gradient, attention):
    model = llama(attention)
    before = state(model)
    result = run(model, method=fastlur.LUR(gradient=gradient))
    assert model.config._attn_implementation == attention
    assert not same(before, state(model))
    assert all(bool(torch.isfinite(value).all()) for value in state(model).values())
    assert result.settings["task"] == "causal_lm"


@pytest.mark.parametrize("gradient", ["secant", "optimistic"])
def test_the_fused_kernels_are_what_serves(gradient):
    """Where no other is allowed they are taken, and the direction is that of the plain ones."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = taken(llama(), gradient=gradient)
    plain = taken(llama("eager"), gradient=gradient)
    assert norm(minus(fused, plain)) < 1e-6 * norm(plain)  # the plain ones have their softmax in float32


def test_secant_is_exact_to_first_order():
    exact = taken(llama(), gradient="exact", inner_lr=1e-3)
    near, far = (norm(minus(taken(llama(), gradient=g, inner_lr=1e-3), exact)) for g in ("secant", "first_order"))
    assert near < 0.05 * far


@pytest.mark.parametrize("gradient", ["first_order", "secant", "optimistic"])
def test_gradient_checkpointing_gives_the_same_direction(gradient):
    found = []
    for checkpointed in (False, True):
        model = llama()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(taken(model, steps=2, gradient=gradient))
    assert norm(minus(*found)) < 1e-12 * norm(found[0])


def test_exact_refuses_checkpointing_and_says_what_to_use():
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = state(model)
    with pytest.raises(ModelError, match=r"checkpointing.*use 'secant'"):
        taken(model, gradient="exact")
    assert same(before, state(model))


def test_reentrant_checkpointing_is_refused_with_the_remedy_before_anything_changes():
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    before = state(model)
    with pytest.raises(ModelError, match='"use_reentrant": False'):
        run(model)
    assert same(before, state(model))


def test_the_configuration_is_as_it_was():
    model = llama()
    before = model.config.to_dict()
    assert before["use_cache"]
    run(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_others_apart(tied):
    model = llama(tied=tied)
    run(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied


class TestHalfPrecision:
    def test_the_direction_under_autocast_is_that_of_fp32(self):
        full, half = (taken(llama(dtype=torch.float32), precision=p, inner_lr=0.0) for p in ("fp32", "bf16"))
        vectors = [torch.cat([each.flatten() for each in found.values()]) for found in (full, half)]
        assert cosine_similarity(*vectors, dim=0) > 0.99

    @pytest.mark.parametrize("gradient", [mode for mode in MODES if mode != "first_order"])
    def test_what_alignment_adds_survives_autocast(self, gradient):
        """Of a loss without a cap, at whose edge rounding decides whether a token counts."""
        smooth = {"steps": 2, "forgetting": losses.negative_cross_entropy, "inner_lr": 0.3}
        model = llama(dtype=torch.float32)
        whole, plain = (taken(deepcopy(model), gradient=g, **smooth) for g in (gradient, "first_order"))
        half = taken(deepcopy(model), gradient=gradient, precision="bf16", **smooth)
        assert norm(minus(whole, plain)) > 0.2 * norm(whole)
        assert norm(minus(half, whole)) < 0.05 * norm(minus(whole, plain))

    def test_weights_in_bf16_stay_in_bf16(self):
        model = llama(dtype=torch.bfloat16)
        before = state(model)
        run(model, lr=0.5)
        assert all(value.dtype == torch.bfloat16 for value in state(model).values())
        assert not same(before, state(model))


class TestInParts:
    @pytest.mark.parametrize("rows", [1, 3, 8, 100])
    @pytest.mark.parametrize("method", [*MODES, "neggrad_plus", "random_label", "mox"])
    def test_a_few_items_at_a_time_give_the_same_model(self, rows, method):
        whole, parts = llama(), llama()
        method = fastlur.LUR(gradient=method) if method in MODES else method
        first = run(whole, batch_size=8, method=method)
        other = run(parts, batch_size=8, method=method, micro_batch=rows)
        assert (first.settings["micro_batch"], other.settings["micro_batch"]) == (None, rows)
        for name, value in state(whole).items():
            torch.testing.assert_close(state(parts)[name], value, rtol=1e-9, atol=1e-11)

    def test_the_model_never_sees_more(self):
        model, seen = llama(), []
        model.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
        run(model, micro_batch=3, batch_size=8)
        assert max(seen) == 3

    @pytest.mark.parametrize("beside", ["novice", "reference", "states", "draws"])
    def test_nor_does_what_is_asked_or_trained_beside_it(self, beside, monkeypatch):
        monkeypatch.setattr(targets, "LEARNED", 9.0)  # it is not about what it learns
        seen, models = [], (llama(), llama())
        given = {
            "novice": lambda model: {"forget_loss": targets.Novice(epochs=1, lr=1e-2, start=deepcopy(model))},
            "reference": lambda _: {"loss": ReferenceKL(), "method": "neggrad_plus"},  # its first gradient is 0
            "states": lambda _: {"loss": RMU(layer=1, retain_weight=1.0).retain},
            "draws": lambda _: {"forget_loss": Collapse(end=2, tokens=4)},
        }[beside]
        run(models[0], batch_size=8, **given(models[0]))
        models[1].register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
        run(models[1], batch_size=8, micro_batch=3, **given(models[1]))  # copies have the hook too
        assert max(seen) == 3
        for name, value in state(models[0]).items():
            torch.testing.assert_close(state(models[1])[name], value, rtol=1e-6, atol=1e-8)

    def test_checkpointing_may_be_on_as_well(self):
        whole, parts = llama(), llama()
        run(whole)
        parts.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run(parts, micro_batch=2)
        for name, value in state(whole).items():
            torch.testing.assert_close(state(parts)[name], value, rtol=1e-9, atol=1e-11)

    def test_a_layer_that_looks_at_the_whole_batch_is_refused_before_anything_changes(self, cnn):
        before = state(cnn)
        data = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
        other = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
        with pytest.raises(ModelError, match=r"micro_batch=2 .*normalises by the whole batch"):
            fastlur.unlearn(cnn, data, other, steps=2, batch_size=8, micro_batch=2, progress=False)
        assert same(before, state(cnn))

    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_a_number_of_items_that_is_none(self, value):
        with pytest.raises(ArgumentError, match="micro_batch="):
            run(llama(), micro_batch=value)
