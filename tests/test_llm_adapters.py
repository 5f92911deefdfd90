"""Adapters: only they move, they merge afterwards, and a run in which none would move is refused by name."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp, same, state
from lm import llama, text
from torch import nn

import fastlur
from fastlur import targets
from fastlur.errors import ArgumentError, ModelError

FORGET, RETAIN = text(8, 1), text(8, 2)
REENTRANT = {"use_reentrant": True}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the name that checkpointing has had for years
    pytest.mark.filterwarnings("ignore:None of the inputs have"),
]


def run(model, **options):
    options = {"steps": 3, "batch_size": 4, "progress": False, "lr": 0.5} | options
    return fastlur.unlearn(model, FORGET, RETAIN, **options)


def adapted(model=None, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    made = peft.get_peft_model(model or llama(), peft.LoraConfig(**options))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:  # 0 as they come, and then A has no gradient yet
            nn.init.normal_(parameter, std=0.1)
    return made


def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=RETAIN["input_ids"], attention_mask=RETAIN["attention_mask"]).logits


def base(model):
    return {name: value for name, value in state(model).items() if "lora_" not in name}


def adapters(model):
    return {name: value for name, value in state(model).items() if "lora_" in name}


class TestOnlyAdaptersMove:
    @pytest.mark.parametrize("method", ["lur", "neggrad_plus", "mox", "scrub", "salun"])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_the_base_is_bit_identical(self, method, optimizer):
        model = adapted()
        before, moving = base(model), adapters(model)
        result = run(model, method=method, optimizer=optimizer, lr=0.01, weight_decay=0.1)
        assert result.settings["task"] == "causal_lm"
        assert same(before, base(model))
        assert not any(torch.equal(moving[name], now) for name, now in adapters(model).items())
        assert result.settings["parameters_moved"] == sum(value.numel() for value in moving.values())

    def test_merging_afterwards_gives_the_same_answers(self):
        model = adapted()
        given = outputs(model)
        run(model)
        learned = outputs(model)
        assert not torch.allclose(learned, given)
        merged = model.merge_and_unload()
        assert not adapters(merged)
        torch.testing.assert_close(outputs(merged), learned, rtol=1e-9, atol=1e-9)

    def test_what_is_saved_beside_them_moves_too(self):
        model = adapted(llama(tied=False), modules_to_save=["lm_head"])
        run(model)
        head = model.base_model.model.lm_head
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)

    def test_checkpointed_without_frozen_inputs_it_is_the_same_run(self):
        plain, checkpointed = adapted(), adapted()
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run(plain)
        run(checkpointed)
        for name, value in state(plain).items():
            torch.testing.assert_close(state(checkpointed)[name], value, rtol=1e-10, atol=1e-12)


class TestANovice:
    """What is fine-tuned with adapters was something before them, and a novice has adapters of its own."""

    def test_of_a_start_with_new_adapters_these_alone_learn(self, monkeypatch):
        monkeypatch.setattr(targets, "LEARNED", 9.0)
        model, start = adapted(), adapted(llama(seed=3))
        before = base(model), base(start), adapters(model)
        result = run(model, forget_loss=targets.Novice(epochs=2, lr=1e-2, start=start), lr=0.05)
        assert result.settings["forget_target"].startswith("Imitation(")
        assert same(before[0], base(model)) and same(before[1], base(start))
        assert not same(before[2], adapters(model))

    def test_a_start_without_adapters_is_refused_with_what_to_do(self):
        model = adapted()
        before = state(model)
        with pytest.raises(ArgumentError, match=r"start: is no model of this kind.*has adapters, give it new ones"):
            run(model, forget_loss=targets.Novice(epochs=1, start=llama()))
        assert same(before, state(model))


def frozen_inputs():
    model = adapted()
    inner = model.base_model.model
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
    if getattr(inner, "_require_grads_hook", None) is not None:
        inner.disable_input_require_grads()
    return model


def merged():
    model = adapted()
    model.merge_adapter()
    return model


def disabled():
    model = adapted()
    model.base_model.disable_adapter_layers()
    return model


def disabled_but_trainable():
    model = disabled()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def inference():
    return adapted(inference_mode=True)


def inactive():
    peft = pytest.importorskip("peft")
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    return model


def beside_the_head():
    """The head gets a gradient, so that a loss has one; the adapters under the checkpoints get none."""
    model = adapted(llama(tied=False))
    model.merge_adapter()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    return model


def beside_a_saved_module():
    """A whole norm is trained beside the adapters, which PEFT names among its own parts."""
    model = adapted(modules_to_save=["norm"])
    model.merge_adapter()
    return model


TRAPS = {
    "reentrant checkpointing over frozen inputs": (frozen_inputs, "enable_input_require_grads"),
    "merged": (merged, "unmerge_adapter"),
    "disabled": (disabled, "enable_adapter_layers"),
    "disabled, though they may move": (disabled_but_trainable, "enable_adapter_layers"),
    "for inference": (inference, "is_trainable=True"),
    "not the active one": (inactive, "set_adapter"),
    "only another part has a gradient": (beside_the_head, "unmerge_adapter"),
    "only a module that is saved with them has one": (beside_a_saved_module, "unmerge_adapter"),
}


class TestTraps:
    @pytest.mark.parametrize("name", TRAPS)
    def test_adapters_without_a_gradient_are_refused_before_anything_changes(self, name):
        make, remedy = TRAPS[name]
        model = make()
        before = state(model)
        with pytest.raises(ModelError, match=rf"adapters.*{remedy}"):
            run(model)
        assert same(before, state(model))

    def test_the_adapters_are_named(self):
        with pytest.raises(ModelError, match=r"self_attn\.q_proj\.lora_A\.default\.weight, .*… \(8\)"):
            run(merged())

    def test_parameters_that_no_loss_depends_on_are_refused_without_adapters_too(self):
        model = Aside()
        before = state(model)
        data = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(2)]
        with pytest.raises(
            ModelError, match=r"no loss depends on .* aside\.(weight|bias), aside\.(weight|bias).*`parameters`"
        ):
            fastlur.unlearn(model, *data, parameters="aside.*", progress=False)
        assert same(before, state(model))


class Aside(nn.Module):
    """A layer that nothing goes through."""

    def __init__(self):
        super().__init__()
        self.body, self.aside = mlp(), nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)
