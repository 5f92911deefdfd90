"""LUR inside the Trainer of transformers, as open-unlearning calls it: the direction is the library's own."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from helpers import minus, norm, state
from trainer_cases import WORDS, Reads, UnlearnTrainer, adapted, batches_of, close, expected, model, trained

import fastlur
from fastlur.integrations.open_unlearning import LOSSES, bounded_ascent, gradient_ascent, lur_trainer
from fastlur.llm import causal_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("gradient", ["secant", "first_order", "optimistic"])
@pytest.mark.parametrize("order", ["retain_first", "forget_first"])
@pytest.mark.parametrize("relative", [False, True])
def test_what_the_optimizer_gets_is_the_meta_gradient(tmp_path, gradient, order, relative):
    network = model()
    options = {"gradient": gradient, "order": order, "inner_lr": 0.3}
    wanted = expected(network, batches_of(1)[0], relative=relative, **options)
    undisplaced = expected(network, batches_of(1)[0], relative=relative, **options | {"inner_lr": 0.0})
    _, watch = trained(tmp_path, network, forget_weight=0.5, relative_inner_lr=relative, **options)
    assert close(watch.seen[0], wanted)
    assert not close(watch.seen[0], undisplaced, 1e-3)


def test_optimistic_remembers_from_step_to_step(tmp_path):
    network, twin, previous = model(), model(), {}
    _, watch = trained(tmp_path, network, batches=3, forget_weight=0.5, inner_lr=0.3)
    for batch, found in zip(batches_of(3), watch.seen, strict=True):
        wanted = expected(twin, batch, previous=previous, inner_lr=0.3, gradient="optimistic")
        assert close(found, wanted)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter -= 0.05 * wanted[name]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(network.parameters(), twin.parameters(), strict=True))


def test_steps_are_those_of_a_meta_step(tmp_path):
    network, twin = model(), model()
    trained(tmp_path, network, batches=3, forget_weight=0.5, inner_lr=0.3, gradient="secant")
    options = {"lr": 0.05, "momentum": 0.0, "inner_lr": 0.3, "gradient": "secant", "forget_weight": 0.5}
    with fastlur.MetaStep(twin, causal_cross_entropy, bounded_ascent, **options) as step:
        for batch in batches_of(3):
            step(batch["forget"], batch["retain"])
    now, then = state(network), state(twin)
    assert all(torch.allclose(now[name], then[name], atol=1e-7) for name in now)


def test_accumulated_micro_batches_are_averaged(tmp_path):
    network = model()
    parts = [expected(network, batch, inner_lr=0.3, gradient="secant") for batch in batches_of(2)]
    _, watch = trained(tmp_path, network, batches=2, accumulate=2, forget_weight=0.5, inner_lr=0.3, gradient="secant")
    assert len(watch.seen) == 1
    assert close(watch.seen[0], {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})


def test_both_passes_of_a_loss_see_the_same_dropout(tmp_path):
    """With the step at nothing, secant's two retain passes are at one point: they must then agree."""
    with_dropout = model(dropout=0.5)
    trainer, watch = trained(tmp_path, with_dropout, inner_lr=0.0, gradient="secant")
    network = model(dropout=0.5)
    _, again = trained(tmp_path, network, inner_lr=0.0, gradient="first_order")
    assert close(watch.seen[0], again.seen[0])
    without = trained(tmp_path, model(), inner_lr=0.0, gradient="secant")[1]
    assert not close(watch.seen[0], without.seen[0], 1e-2)
    assert trainer.state.global_step == 1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    for reentrant in (True, False):
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        plain = trained(tmp_path, model(), inner_lr=0.3, gradient="secant")[1].seen[0]
        network = model()
        if reentrant:
            network.enable_input_require_grads()
        again = trained(tmp_path, network, arguments=more, inner_lr=0.3, gradient="secant")[1].seen[0]
        assert close(again, plain)


def test_bf16_autocast_sees_the_displaced_weights(tmp_path):
    """A stale cast would make the displaced gradient that at θ, and the two directions the same."""
    far, near = (
        trained(tmp_path, model(dtype=torch.float32), arguments={"bf16": True}, inner_lr=a, gradient="secant")[1]
        for a in (30.0, 0.0)
    )
    assert norm(minus(far.seen[0], near.seen[0])) > 0.05 * norm(near.seen[0])


def test_frozen_parameters_have_no_gradient_and_do_not_move(tmp_path):
    network = model()
    frozen = dict(network.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    frozen.requires_grad_(False)
    before = frozen.clone()
    lent = network.model.layers[1].mlp.up_proj.weight
    address = lent.data_ptr()
    _, watch = trained(tmp_path, network, inner_lr=0.3)
    assert torch.equal(frozen, before) and "model.layers.0.mlp.up_proj.weight" not in watch.seen[0]
    assert lent.data_ptr() == address


def test_a_model_really_forgets_and_keeps(tmp_path):
    network = model(dtype=torch.float32)
    few = batches_of(1)[0]
    learning = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        loss = causal_cross_entropy(network, few["forget"]) + causal_cross_entropy(network, few["retain"])
        learning.zero_grad()
        loss.backward()
        learning.step()
    network.zero_grad()
    with torch.no_grad():
        before = {side: float(causal_cross_entropy(network, batch)) for side, batch in few.items()}
    more = {"num_train_epochs": 60, "optim": "adamw_torch", "learning_rate": 3e-3}
    trainer, _ = trained(tmp_path, network, arguments=more, forget_weight=0.1)
    with torch.no_grad():
        after = {side: float(causal_cross_entropy(network, batch)) for side, batch in few.items()}
    assert before["forget"] < 0.5 < 2.0 < after["forget"]
    assert after["retain"] < before["retain"] + 0.3
    assert trainer.state.global_step == 60


def test_evaluation_of_an_ordinary_batch_is_the_trainers_own(tmp_path):
    trainer, _ = trained(tmp_path, model(), forget_weight=0.5)
    batch = batches_of(1)[0]
    with torch.no_grad():
        own = trainer.compute_loss(trainer.model, dict(batch["retain"]))
        both = trainer.compute_loss(trainer.model, batch)
        retain = causal_cross_entropy(trainer.model, batch["retain"])
        forget = bounded_ascent(trainer.model, batch["forget"])
    assert torch.allclose(own.double(), retain)
    assert torch.allclose(both, retain + 0.5 * forget)


def test_the_losses_by_name():
    network, batch = model(), batches_of(1)[0]["forget"]
    plain = causal_cross_entropy(network, batch)
    assert torch.equal(LOSSES["grad_ascent"](network, batch), -plain)
    with torch.no_grad():
        network.model.norm.weight.mul_(1e3)
    assert float(gradient_ascent(network, batch)) < -100
    logits, labels = network(batch["input_ids"], batch["attention_mask"]).logits[:, :-1], batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    capped = each.clamp(max=float(torch.tensor(float(WORDS)).log()))
    assert torch.allclose(LOSSES["bounded"](network, batch), -capped.mean())


def test_it_is_registered_under_its_own_name_and_built_on_theirs(monkeypatch):
    package, unlearn, base = (types.ModuleType(name) for name in ("trainer", "trainer.unlearn", "trainer.unlearn.base"))
    base.UnlearnTrainer = UnlearnTrainer
    for name, module in (("trainer", package), ("trainer.unlearn", unlearn), ("trainer.unlearn.base", base)):
        monkeypatch.setitem(sys.modules, name, module)
    lur_trainer.cache_clear()
    made = lur_trainer()
    assert made.__name__ == "LUR" and issubclass(made, UnlearnTrainer)
    assert lur_trainer() is made
    lur_trainer.cache_clear()


def test_without_open_unlearning_the_error_says_so(monkeypatch):
    lur_trainer.cache_clear()
    monkeypatch.setitem(sys.modules, "trainer", None)
    with pytest.raises(fastlur.FastlurError, match="base=None: open-unlearning"):
        lur_trainer()


def test_the_tokenizer_is_found_under_both_names(tmp_path):
    trainer, _ = trained(tmp_path, model())
    assert isinstance(trainer.tokenizer, Reads) and trainer.processing_class is trainer.tokenizer


def test_only_adapters_move(tmp_path):
    network = adapted()
    before = state(network)
    trained(tmp_path, network, batches=2, inner_lr=0.3)
    moved = {name for name, value in state(network).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
