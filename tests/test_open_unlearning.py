"""LUR inside the Trainer of transformers, as open-unlearning calls it: the direction is the library's own."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from helpers import minus, norm, state

import fastlur
from fastlur.errors import ModelError, NonFiniteError
from fastlur.integrations.open_unlearning import LOSSES, bounded_ascent, gradient_ascent, lur_trainer
from fastlur.integrations.trainer import refuse_many
from fastlur.llm import NPO, causal_cross_entropy

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
WORDS, TOKENS = 23, 7


class FinetuneTrainer(transformers.Trainer):
    """As open-unlearning's: takes an evaluator and the template's arguments, and is otherwise a Trainer."""

    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)


class Reads:
    """What open-unlearning hands on under the Trainer's old name for it."""


class UnlearnTrainer(FinetuneTrainer):
    """As open-unlearning's; evaluation passes by what methods make of `compute_loss`."""


class ForgetRetain(torch.utils.data.Dataset):
    """An item of each side, as the data set of that name gives them."""

    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, at):
        return {"forget": self.forget[at], "retain": self.retain[at % len(self.retain)]}


def collate(instances):
    """Sides are collated one by one; prompts are masked, short answers padded on the right."""
    if "input_ids" not in instances[0]:
        return {side: collate([each[side] for each in instances]) for side in instances[0]}
    batch = {}
    for name, fill in (("input_ids", 0), ("labels", -100)):
        rows = [each[name] for each in instances]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch | {"index": torch.arange(len(instances))}


def items(count, seed):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for at in range(count):
        ids = torch.randint(1, WORDS, (TOKENS - at % 3,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def model(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=dropout,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


class Watch(transformers.TrainerCallback):
    """The gradients that the optimizer is about to get, step by step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def trained(tmp_path, network, batches=1, accumulate=1, base=UnlearnTrainer, arguments=None, **method):
    """Train for an epoch of that many batches of four, in the order of the items; returns the trainer and the watch."""
    count = 4 * batches
    watch = Watch()
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    } | (arguments or {})
    trainer = lur_trainer(base)(
        model=network,
        train_dataset=ForgetRetain(items(count, 1), items(count, 2)),
        eval_dataset=None,
        tokenizer=Reads(),
        data_collator=collate,
        args=transformers.TrainingArguments(**options),
        callbacks=[watch],
        **method,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(range(count))
    trainer.train()
    return trainer, watch


def batches_of(number):
    """The batches that the Trainer makes of the items."""
    sides = {side: items(4 * number, seed) for side, seed in (("forget", 1), ("retain", 2))}
    found = []
    for at in range(number):
        made = {side: collate(each[4 * at : 4 * at + 4]) for side, each in sides.items()}
        found.append({side: {k: v for k, v in each.items() if k != "index"} for side, each in made.items()})
    return found


def functional(network, loss, batch):
    """A loss as a function of the parameters by name."""

    def called(params):
        def stand_in(**inputs):
            return torch.func.functional_call(network, params, (), inputs | {"use_cache": False}, tie_weights=True)

        return loss(stand_in, batch)

    return called


def expected(network, batch, previous=None, forget_loss=bounded_ascent, order="retain_first", weight=0.5, **options):
    retain = functional(network, causal_cross_entropy, batch["retain"])
    forget = functional(network, lambda m, b: weight * forget_loss(m, b), batch["forget"])
    inner, outer = (retain, forget) if order == "retain_first" else (forget, retain)
    params = {name: p.detach().clone() for name, p in network.named_parameters()}
    return fastlur.meta_gradient(inner, outer, params, previous=previous, **options)


def close(found, wanted, tolerance=1e-9):
    return norm(minus(found, wanted)) <= tolerance * norm(wanted)


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


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"gradient": "exact"}, "gradient='exact'"),
        ({"gradient": "popov"}, "gradient='popov'"),
        ({"forget_loss": "npoo"}, "forget_loss='npoo'"),
        ({"forget_loss": 3}, "forget_loss=3"),
        ({"forget_loss": NPO()}, r"reference=fastlur\.llm\.reference_log_probs"),
        ({"inner_lr": -1.0}, "inner_lr=-1.0"),
        ({"forget_weight": float("nan")}, "forget_weight=nan"),
        ({"order": "both"}, "order='both'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(tmp_path, wrong, named):
    with pytest.raises(fastlur.FastlurError, match=named):
        trained(tmp_path, model(), **wrong)


def test_the_tokenizer_is_found_under_both_names(tmp_path):
    trainer, _ = trained(tmp_path, model())
    assert isinstance(trainer.tokenizer, Reads) and trainer.processing_class is trainer.tokenizer


def adapted(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model(), config)


def test_only_adapters_move(tmp_path):
    network = adapted()
    before = state(network)
    trained(tmp_path, network, batches=2, inner_lr=0.3)
    moved = {name for name, value in state(network).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_adapters_that_get_no_gradient_are_refused_with_the_remedy(tmp_path):
    """Merged ones alone, and beside a norm that would be trained in their place without a word."""
    for more in ({}, {"modules_to_save": ["norm"]}):
        network = adapted(**more)
        network.merge_adapter()
        before = state(network)
        with pytest.raises(ModelError, match=r"no gradient reaches its adapters.*unmerge_adapter"):
            trained(tmp_path, network)
        after = state(network)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_model_that_may_not_move_is_refused(tmp_path):
    with pytest.raises(ModelError, match="nothing may move; let some"):
        trained(tmp_path, model().requires_grad_(False))
    network = adapted().requires_grad_(False)
    with pytest.raises(ModelError, match="its adapters are frozen"):
        trained(tmp_path, network)


@pytest.mark.parametrize("gradient", ["secant", "optimistic", "first_order"])
def test_what_is_not_finite_ends_the_run_and_moves_nothing(tmp_path, gradient):
    def broken(network, batch):
        calls.append(len(calls))
        return bounded_ascent(network, batch) * (float("nan") if len(calls) > 2 else 1.0)

    calls: list[int] = []
    network, twin = model(), model()
    with pytest.raises(NonFiniteError, match=r"step 3: .*no gradient of this batch") as caught:
        trained(tmp_path, network, batches=5, gradient=gradient, forget_loss=broken)
    assert caught.value.step == 3
    trained(tmp_path, twin, batches=5, gradient=gradient, arguments={"max_steps": 2})
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_sides_is_refused(tmp_path):
    trainer, _ = trained(tmp_path, model())
    with pytest.raises(fastlur.FastlurError, match="forget: a batch must hold"):
        trainer.training_step(trainer.model, batches_of(1)[0]["retain"])


@pytest.mark.parametrize("kind", ["MULTI_GPU", "FSDP", "DEEPSPEED"])
def test_more_than_one_process_is_refused(tmp_path, kind):
    from accelerate.utils import DistributedType

    trainer, _ = trained(tmp_path, model())
    accelerator = types.SimpleNamespace(distributed_type=DistributedType[kind])
    with pytest.raises(fastlur.FastlurError, match=f"not {kind}"):
        refuse_many(trainer.args, accelerator)


def test_scaled_losses_are_refused(tmp_path):
    with pytest.raises(fastlur.FastlurError, match="fp16=True"):
        trained(tmp_path, model(), arguments={"fp16": True})
