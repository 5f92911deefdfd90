"""The core of a forget set: what is odd goes, the variance shrinks, and the same call gives the same core."""

from __future__ import annotations

import pytest
import torch
from helpers import same, state
from tiny_lm import TinyLM, padded, rows, texts, to_the_left
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur.llm import Encoded, core
from fastlur.llm.core import last_tokens


def with_odd_ones():
    """36 items of a few tokens and 4 of others, at places 5, 11, 20 and 33, and a model that tells these far apart."""
    model, batch = TinyLM(), texts(40)
    batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 3 + 1, 0)
    odd = torch.tensor([5, 11, 20, 33])
    batch["input_ids"][odd] = torch.where(batch["attention_mask"][odd] == 1, 10 + batch["input_ids"][odd] % 3, 0)
    with torch.no_grad():
        model.embed.weight[10:] = 8 * torch.randn(3, 8, dtype=torch.float64)
    return model, batch, set(odd.tolist())


def test_what_is_odd_is_dropped_and_the_variance_shrinks():
    model, batch, odd = with_odd_ones()
    found = core(model, batch, 0.9)
    assert set(range(40)) - set(found.kept.tolist()) == odd
    assert found.variance_after < 0.5 * found.variance_before
    assert found.kept.tolist() == sorted(found.kept.tolist())


def test_variances_are_those_of_the_last_tokens_states():
    model, batch, _ = with_odd_ones()
    found = core(model, batch, 0.5, layer=0)
    h = []
    for ids, _ in rows(batch):
        x = model.embed(ids)[None] + model.place(torch.arange(len(ids)))
        h.append(model.layers[0](x, torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None])[0][0, -1])
    h = torch.stack(h).detach()
    for value, states in ((found.variance_before, h), (found.variance_after, h[found.kept])):
        assert value == pytest.approx(float(states.var(0, correction=0).sum()))
    assert len(found.kept) == 20 and len(found.scores) == 40


@pytest.mark.parametrize("moved", [lambda b: padded(b, 3), to_the_left])
def test_padding_batches_and_repetition_make_no_difference(moved):
    model, batch, _ = with_odd_ones()
    found = core(model, batch, 0.8)
    for again in (core(model, batch, 0.8), core(model, moved(batch), 0.8), core(model, batch, 0.8, batch_size=7)):
        assert torch.equal(found.kept, again.kept)
    assert torch.equal(found.scores, core(model, batch, 0.8).scores)
    assert not torch.equal(found.scores, core(model, batch, 0.8, seed=1).scores)


def test_the_model_is_left_as_it_is():
    model, batch = TinyLM(dropout=0.4).train(), texts(12)
    before, random = state(model), torch.get_rng_state()
    core(model, batch, 0.75)
    assert same(before, state(model)) and model.training and torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_all_may_be_kept_and_one_is_at_least():
    model, batch, _ = with_odd_ones()
    whole = core(model, batch, 1.0)
    assert whole.kept.tolist() == list(range(40))
    assert whole.variance_after == whole.variance_before
    assert len(core(model, batch, 1e-3).kept) == 1


def test_says_so_where_nothing_is_gained():
    """Two far-apart heaps: whatever an isolation forest drops there is no outlier of the whole."""
    model, batch = TinyLM(), texts(40)
    batch["input_ids"] = torch.where(torch.arange(40)[:, None] < 20, 1, 12).expand(40, 8) * batch["attention_mask"]
    batch["input_ids"][18] = torch.where(batch["attention_mask"][18] == 1, 6, 0)
    with torch.no_grad():
        model.embed.weight[1], model.embed.weight[12], model.embed.weight[6] = 5.0, -5.0, 0.0
        model.embed.weight[1, ::2] *= -1
        model.embed.weight[12, ::2] *= -1
    with pytest.warns(UserWarning, match="nothing is gained"):
        found = core(model, batch, 0.975)
    assert found.variance_after > found.variance_before


class TestItemsOfTheCore:
    def test_are_taken_of_tensors_data_sets_and_encoded_text(self):
        model, batch, odd = with_odd_ones()
        found = core(model, batch, 0.9)
        kept = [number for number in range(40) if number not in odd]
        assert torch.equal(found.of(batch)["labels"], batch["labels"][kept])
        assert torch.equal(found.of((batch["labels"],))[0], batch["labels"][kept])
        assert found.of(TensorDataset(batch["labels"])).indices == kept
        items = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in rows(batch)]
        encoded = found.of(Encoded(items, 0))
        assert isinstance(encoded, Encoded) and len(encoded) == 36
        assert torch.equal(encoded[5]["input_ids"], items[6]["input_ids"])
        assert torch.equal(core(model, Encoded(items, 0), 0.9).kept, found.kept)

    def test_serve_any_method(self):
        model, batch, _ = with_odd_ones()
        fastlur.unlearn(
            model, core(model, batch, 0.9).of(batch), texts(20, seed=1), loss=fastlur.llm.causal_cross_entropy,
            forget_loss=fastlur.llm.SimNPO(), steps=2, progress=False,
        )  # fmt: skip

    @pytest.mark.parametrize("order", [{"shuffle": True}, {"drop_last": True}])
    def test_of_a_loader_in_another_order_there_are_none(self, order):
        model, batch, _ = with_odd_ones()
        items = [{name: value[index] for name, value in batch.items()} for index in range(40)]
        assert torch.equal(core(model, DataLoader(items, 8), 0.9).kept, core(model, batch, 0.9).kept)
        with pytest.raises(fastlur.DataError, match="shuffles or leaves items out"):
            core(model, DataLoader(items, 8, **order), 0.9)

    def test_of_other_data_are_refused(self):
        model, batch, _ = with_odd_ones()
        found = core(model, batch, 0.9)
        with pytest.raises(fastlur.ArgumentError, match="3 items, and the core is of 40"):
            found.of(texts(3))
        with pytest.raises(fastlur.ArgumentError, match="no items can be taken"):
            found.of(DataLoader(TensorDataset(batch["labels"])))


def test_the_last_token_is_the_last_that_the_mask_has():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert last_tokens({"input_ids": mask, "attention_mask": mask}).tolist() == [1, 3, 3]
    assert last_tokens({"input_ids": mask}).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"share": 0}, "share=0"),
        ({"share": 1.1}, r"share=1\.1"),
        ({"layer": 7}, "2 blocks"),
        ({"layer": 0.5}, r"layer=0\.5"),
        ({"seed": "a"}, "seed='a'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"precision": "half"}, "precision='half'"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        core(TinyLM(), texts(5), **wrong)


def test_states_that_are_not_finite_are_refused():
    model = TinyLM()
    torch.nn.init.constant_(model.embed.weight, float("nan"))
    with pytest.raises(fastlur.DataError, match="not finite"):
        core(model, texts(5))
    with pytest.raises(fastlur.DataError, match="input_ids"):
        core(model, (torch.zeros(3, 2), torch.zeros(3)))
