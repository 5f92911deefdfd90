"""References: made once, found again by content whatever the order and the padding, and never made up."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import of_both, same, state
from tiny_lm import TinyLM, answers, padded, texts, to_the_left
from torch import nn

import fastlur
from fastlur.llm import DPO, NPO, RMU, ReferenceKL, causal_cross_entropy, reference_log_probs, with_preferred
from fastlur.llm.reference import without_adapters
from fastlur.methods.base import Recipe, State
from fastlur.texts import keys_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for it


class Seen(Exception):
    pass


def peft_llama(**more):
    """A Llama of two layers with adapters on some of its matrices; the extra must be there."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **more)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)


def prepared(model, forget, retain, **losses):
    """The losses that a run would have gone on with."""
    found = []

    class Looking(fastlur.LUR):
        name = "looking"

        def prepare(self, passes):
            found.append(dict(passes.losses))
            raise Seen

    with pytest.raises(Seen):
        run(model, forget, retain, method=Looking(), **losses)
    return found[0]


def run(model, forget, retain, **options):
    return fastlur.unlearn(
        model,
        forget,
        retain,
        **{"loss": causal_cross_entropy, "steps": 4, "batch_size": 3, "progress": False} | options,
    )


class TestKeys:
    @pytest.mark.parametrize("moved", [lambda b: padded(b, 4), to_the_left, lambda b: to_the_left(b, 3)])
    def test_padding_makes_no_difference(self, moved):
        assert torch.equal(keys_of(texts(9)), keys_of(moved(texts(9))))

    def test_nor_does_what_follows_the_last_token_that_counts(self):
        batch = {name: value.clone() for name, value in texts(5).items()}
        later = batch["input_ids"].clone()
        last = (batch["labels"] != -100).long().cumsum(1).argmax(1)
        later[torch.arange(8) > last[:, None]] = 11
        unmasked = {"input_ids": later, "labels": batch["labels"], "attention_mask": torch.ones_like(later)}
        assert torch.equal(keys_of(batch), keys_of(unmasked))

    def test_a_token_its_place_and_whether_it_counts_make_a_difference(self):
        batch = texts(1, longest=8)
        batch = {name: torch.cat([value] * 4) for name, value in batch.items()}
        batch["input_ids"][1, 0] += 1
        batch["input_ids"][2, :2] = batch["input_ids"][2, :2].flip(0)
        batch["labels"][3, 2] = batch["input_ids"][3, 2]
        assert batch["input_ids"][0, 0] != batch["input_ids"][0, 1]
        assert len(set(keys_of(batch).tolist())) == 4

    def test_many_items_have_many_keys(self):
        ids = torch.cartesian_prod(*[torch.arange(1, 13)] * 4)
        batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        keys = keys_of(batch)
        assert len(keys.unique()) == len(ids)
        bits = (keys[:, None] >> torch.arange(64)) & 1
        assert bool((bits.double().mean(0) - 0.5).abs().lt(0.02).all())


class TestLogProbs:
    def test_are_those_of_the_answers_in_any_order(self):
        model, batch = TinyLM(), texts(9)
        reference = reference_log_probs(model, batch, batch_size=4)
        order = torch.randperm(9)
        shuffled = to_the_left({name: value[order] for name, value in batch.items()})
        torch.testing.assert_close(reference.of(shuffled), answers(model, batch)[0].detach()[order])

    def test_the_other_answers_are_among_them(self):
        model, other = TinyLM(), texts(9, seed=4, asked=0)
        reference = reference_log_probs(model, with_preferred(texts(9), other))
        torch.testing.assert_close(reference.of(other), answers(model, other)[0].detach())

    def test_items_that_come_twice_are_one(self):
        batch = texts(3)
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        assert len(reference_log_probs(TinyLM(), twice).keys) == 3

    def test_an_item_that_was_not_seen_is_an_error_and_no_second_pass(self):
        model = TinyLM()
        reference = reference_log_probs(model, texts(4))
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(fastlur.DataError, match=r"items \[1\] of a batch were not seen"):
            reference.of(
                {
                    n: torch.cat([v[:1], w[:1]])
                    for (n, v), w in zip(texts(4).items(), texts(4, seed=8).values(), strict=True)
                }
            )
        handle.remove()
        assert not calls

    def test_are_taken_in_eval_mode_and_leave_no_trace(self):
        model = TinyLM(dropout=0.5).train()
        before, random = state(model), torch.get_rng_state()
        reference = reference_log_probs(model, texts(5))
        assert model.training and same(before, state(model)) and torch.equal(random, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
        torch.testing.assert_close(reference.of(texts(5)), answers(model.eval(), texts(5))[0].detach())

    @pytest.mark.parametrize(
        ("wrong", "said"), [({"batch_size": 0}, "batch_size=0"), ({"precision": "fp8"}, "precision='fp8'")]
    )
    def test_arguments_out_of_range_are_refused(self, wrong, said):
        with pytest.raises(fastlur.ArgumentError, match=said):
            reference_log_probs(TinyLM(), texts(3), **wrong)
        with pytest.raises(fastlur.DataError, match="input_ids"):
            reference_log_probs(nn.Linear(2, 2), (torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)))


class TestInARun:
    @pytest.mark.parametrize("loss", [NPO(0.3), DPO(0.3)])
    def test_the_reference_is_the_model_as_given(self, loss):
        model, forget = TinyLM(dropout=0.3), with_preferred(texts(7), texts(7, seed=2, asked=0))
        twin = copy.deepcopy(model).eval()
        made = prepared(model, forget, texts(5, seed=1), forget_loss=loss)["forget"]
        torch.testing.assert_close(made.reference.of(texts(7)), answers(twin, texts(7))[0].detach())
        assert type(made) is type(loss) and made.beta == loss.beta

    def test_forwards_are_made_once_before_the_first_step(self):
        """The whole forget set, and in steps a pass a side and no more; no second model."""
        calls = []

        def forwards(loss):
            model = TinyLM()
            calls.clear()
            model.register_forward_hook(lambda m, *_: calls.append(m.training))
            run(model, texts(7), texts(5, seed=1), forget_loss=loss, steps=6)
            return calls.count(False), calls.count(True)

        plain, npo = forwards(fastlur.llm.SimNPO()), forwards(NPO())
        assert npo[0] - plain[0] == 3  # 7 items in batches of 3
        assert npo[1] == plain[1]

    @pytest.mark.parametrize("loss", [NPO(0.5), DPO(0.5)])
    def test_an_interrupted_run_ends_the_same(self, tmp_path, loss):
        forget, retain = with_preferred(texts(7), texts(7, seed=2, asked=0)), texts(9, seed=1)
        model = TinyLM(dropout=0.2)
        options = {"forget_loss": loss, "loss": ReferenceKL(cross_entropy=1.0), "steps": 6, "lr": 0.1}
        assert same(*of_both(model, partial(run, model, forget, retain, **options), tmp_path))

    def test_items_that_change_when_they_are_read_are_refused(self):
        class Changing(torch.utils.data.Dataset):
            def __len__(self):
                return 6

            def __getitem__(self, index):
                item = {name: value[index].clone() for name, value in texts(6).items()}
                item["input_ids"][0] = torch.randint(1, 13, ())
                return item

        with pytest.raises(fastlur.DataError, match="not seen when the reference was made"):
            run(TinyLM(), Changing(), texts(5, seed=1), forget_loss=NPO(), steps=40)

    @pytest.mark.parametrize("why", ["drop_last", "replacement"])
    def test_a_loader_that_leaves_items_out_is_refused_before_anything_begins(self, why):
        items = [{name: value[index] for name, value in texts(7).items()} for index in range(7)]
        drawn = {"sampler": torch.utils.data.RandomSampler(items, replacement=True)} if why == "replacement" else {}
        loader = torch.utils.data.DataLoader(items, 2, shuffle=not drawn or None, drop_last=not drawn, **drawn)
        model = TinyLM()
        before = state(model)
        with pytest.raises(fastlur.DataError, match=why):
            run(model, loader, texts(5, seed=1), forget_loss=NPO(), steps=4)
        assert same(state(model), before)
        whole = torch.utils.data.DataLoader(items, 2, shuffle=True)
        run(model, whole, texts(5, seed=1), forget_loss=NPO(), steps=4)

    def test_a_step_of_ones_own_needs_a_reference(self):
        model = TinyLM()
        with pytest.raises(fastlur.ArgumentError, match=r"reference=fastlur\.llm\.reference_log_probs"):
            fastlur.MetaStep(model, causal_cross_entropy, NPO())
        assert "weight" in dict(model.embed.named_parameters())

    def test_a_retain_budget_cannot_be_on_a_loss_that_is_not_there_yet(self):
        for loss in (ReferenceKL(), RMU(0).retain):
            with pytest.raises(fastlur.ArgumentError, match="compares with the model as given"):
                run(TinyLM(), texts(7), texts(5, seed=1), loss=loss, max_retain_loss_increase=0.1)


class TestReferenceKL:
    def test_is_compared_with_the_model_as_given_throughout(self):
        model, retain = TinyLM(), texts(5, seed=1)
        given = copy.deepcopy(model)
        kept = prepared(model, texts(7), retain, forget_loss=NPO(), loss=ReferenceKL())["retain"]
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        inputs = {n: v for n, v in retain.items() if n != "labels"}
        p, q = (m(**inputs).softmax(-1)[:, :-1] for m in (given, model))
        each = (p * (p / q).log()).sum(-1)
        wanted = each[retain["labels"][:, 1:] != -100].mean()
        torch.testing.assert_close(kept(model, retain), wanted)

    def test_serves_a_step_of_ones_own(self):
        model, batch = TinyLM(), texts(5)
        given = copy.deepcopy(model)
        with fastlur.MetaStep(model, ReferenceKL(), fastlur.llm.SimNPO(), lr=0.2) as step:
            values = [float(step(batch, texts(5, seed=1)).retain_loss) for _ in range(4)]
        assert values[0] == pytest.approx(0, abs=1e-12)
        assert values[-1] > 1e-6
        assert not same(state(given), state(model))

    def test_a_novice_learns_by_the_retain_loss_that_is_made(self):
        """What stands in before has no gradient; it must not be what a later part of the preparation descends."""
        order = []

        class Retaining:
            def prepare(self, passes):
                order.append("retain")
                return causal_cross_entropy

            def __call__(self, model, batch):
                return causal_cross_entropy(model, batch)

        class Forgetting(Retaining):
            def prepare(self, passes):
                order.append(passes.losses["retain"] is causal_cross_entropy)
                return causal_cross_entropy

        run(TinyLM(), texts(7), texts(5, seed=1), loss=Retaining(), forget_loss=Forgetting())
        assert order == ["retain", True]


class Adapted(nn.Module):
    """A linear layer with a low-rank one beside it, switched as PEFT's are."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer, self._disable_adapters = base_layer, False
        self.a = nn.Parameter(torch.randn(rank, base_layer.in_features, dtype=base_layer.weight.dtype))
        self.b = nn.Parameter(torch.zeros(base_layer.out_features, rank, dtype=base_layer.weight.dtype))

    def forward(self, x):
        y = self.base_layer(x)
        return y if self._disable_adapters else y + x @ self.a.T @ self.b.T


def adapted():
    model = TinyLM()
    for block in model.layers:
        block.up = Adapted(block.up)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".a", ".b")))
    return model


class TestAdapters:
    def test_a_model_with_adapters_is_its_own_reference(self):
        model = adapted()
        retain = texts(5, seed=1)
        kept = prepared(model, texts(7), retain, forget_loss=NPO(), loss=ReferenceKL())["retain"]
        assert not kept.reference.copies
        copies = prepared(model, texts(7), retain, forget_loss=NPO(), loss=ReferenceKL(keep="copy"))["retain"]
        assert copies.reference.copies
        with torch.no_grad():
            for block in model.layers:
                block.up.b += 0.3 * torch.randn_like(block.up.b)
        moving = [p for p in model.parameters() if p.requires_grad]
        values = [each(model, retain) for each in (kept, copies)]
        assert float(values[0].detach()) == pytest.approx(float(values[1].detach()))
        assert float(values[0].detach()) > 1e-4
        for a, b in zip(*(torch.autograd.grad(v, moving) for v in values), strict=True):
            torch.testing.assert_close(a, b)
        assert [p.requires_grad for _, p in model.named_parameters()] == [
            n.endswith((".a", ".b")) for n, _ in model.named_parameters()
        ]

    def test_a_run_is_the_same_with_either_reference(self):
        models = [adapted() for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        for model, keep in zip(models, ("adapters", "copy"), strict=True):
            run(model, texts(7), texts(5, seed=1), forget_loss=NPO(), loss=ReferenceKL(keep=keep), lr=0.3, steps=6)
        for name, value in state(models[0]).items():
            torch.testing.assert_close(value, state(models[1])[name])
        assert not any(block.up._disable_adapters for block in models[0].layers)

    @pytest.mark.parametrize("why", ["trained", "more", "none"])
    def test_where_that_would_be_another_model_it_is_copied_or_refused(self, why):
        model = TinyLM() if why == "none" else adapted()
        if why == "trained":
            nn.init.ones_(model.layers[0].up.b)
        if why == "more":
            model.out.weight.requires_grad_(True)
        said = {"trained": "trained before", "more": "belong to no adapter", "none": "no PEFT adapters"}[why]
        with pytest.raises(fastlur.ArgumentError, match=said):
            run(model, texts(7), texts(5, seed=1), forget_loss=NPO(), loss=ReferenceKL(keep="adapters"))
        assert prepared(model, texts(7), texts(5, seed=1), forget_loss=NPO(), loss=ReferenceKL())[
            "retain"
        ].reference.copies

    def test_pefts_own_switch_is_the_one_that_is_set(self):
        made = peft_llama(init_lora_weights=False).eval()
        batch = {n: v for n, v in texts(4).items() if n != "labels"}
        with torch.no_grad():
            on = made(**batch).logits
            with without_adapters(made):
                off = made(**batch).logits
            with made.disable_adapter():
                theirs = made(**batch).logits
            assert torch.equal(off, theirs)
            assert not torch.equal(off, on)
            assert torch.equal(made(**batch).logits, on)

    def test_a_peft_model_needs_no_copy(self):
        made = peft_llama()
        before = state(made)
        loss = ReferenceKL(cross_entropy=1.0, keep="adapters")
        run(made, texts(7), texts(5, seed=1), forget_loss=NPO(), loss=loss, lr=0.3)
        moved = {name for name, value in state(made).items() if not torch.equal(value, before[name])}
        assert moved and all("lora_" in name for name in moved)


def test_losses_are_prepared_before_the_method():
    seen = []

    class Looking(Recipe):
        name = "also_looking"
        cost = fastlur.LUR().cost

        def prepare(self, passes):
            seen.append(passes.losses["forget"].reference is not None)
            raise Seen
            return State()

    with pytest.raises(Seen):
        run(TinyLM(), texts(7), texts(5, seed=1), method=Looking(), forget_loss=NPO())
    assert seen == [True]
