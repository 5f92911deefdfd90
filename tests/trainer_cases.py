"""A stand-in of open-unlearning on the Trainer of transformers: its classes, data, a tiny model, and a run of them."""

from __future__ import annotations

import pytest
import torch
from helpers import minus, norm

import fastlur
from fastlur.integrations.open_unlearning import bounded_ascent, lur_trainer
from fastlur.llm import causal_cross_entropy

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

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


def adapted(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model(), config)
