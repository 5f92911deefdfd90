"""The metrics of the benchmark, against values worked out by hand and a model whose probabilities are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llm.authors import Pair
from llm.metrics import (
    forget_quality,
    harmonic_mean,
    judged,
    mean_log_probs,
    remembered,
    rouge_l,
    summary,
    truth_ratio,
    utility,
)
from llm.text import Reader, answer_logits, encoded, generated, prompts, word_tokenizer
from torch import nn
from torch.nn import functional

from fastlur.llm import causal_cross_entropy, likelihood

transformers = pytest.importorskip("transformers")

TEXTS = ("a b c d e f g h", "Question: ? Answer: .")


@pytest.fixture(scope="module")
def reader():
    return Reader(word_tokenizer(TEXTS))


class Chain(nn.Module):
    """The next token depends on the last one alone, with the probabilities of a table; called as a model is."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.log())
        self.seen = []

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False):
        self.seen.append((input_ids, attention_mask, position_ids))
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=None)

    def get_decoder(self):
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=functional.one_hot(input_ids, len(self.table)))

    def get_output_embeddings(self):
        return lambda hidden: hidden.to(self.table.dtype) @ self.table


@pytest.fixture
def chain(reader):
    size = len(reader.tokenizer)
    torch.manual_seed(1)
    return Chain(torch.softmax(2 * torch.randn(size, size), -1))


def test_rouge_l_is_the_recall_of_the_longest_common_subsequence():
    assert rouge_l("the cat sat on the mat", "the cat lay on a mat") == pytest.approx(4 / 6)
    assert rouge_l("a b c d", "d c b a") == pytest.approx(1 / 4)
    assert rouge_l("a b c", "x a y b z c w") == 1.0
    assert rouge_l("a b", "b a b") == 1.0
    assert rouge_l("a", "") == 0.0
    assert rouge_l("Paris is in France.", "PARIS, is in: France") == 1.0
    with pytest.raises(ValueError, match="no words"):
        rouge_l("?", "a")


def test_rouge_l_is_recall_and_not_precision():
    assert rouge_l("a b", "a b c d e f") == 1.0
    assert rouge_l("a b c d e f", "a b") == pytest.approx(1 / 3)


def test_the_truth_ratio_is_wrong_over_right():
    right = np.log(np.array([0.5, 0.1]))
    wrong = np.log(np.array([[0.1, 0.4], [0.2, 0.2]]))
    assert truth_ratio(right, wrong) == pytest.approx([0.2 / 0.5, 0.2 / 0.1])


def test_forget_quality_is_the_kolmogorov_smirnov_p_value():
    """Two samples of four, all of one below all of the other: 2 of the C(8, 4) orders are as extreme."""
    assert forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert forget_quality([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert forget_quality([0.1] * 5 + [0.3] * 5, [2.0] * 10) < 0.001


def test_how_many_remembered_questions_the_test_would_see():
    """Of twenty, each far below all of the truth's: 2·(shift of the share) has to reach what the statistic asks for."""
    unknown = [1 + at / 100 for at in range(20)]
    known = [0.01] * 20
    least = remembered(known, unknown, unknown, 0.05)
    mixed = [[0.01] * count + unknown[count:] for count in (least - 1, least)]
    assert forget_quality(mixed[1], unknown) < 0.05 < forget_quality(mixed[0], unknown)
    assert remembered(unknown, unknown, unknown, 0.05) == 21  # nothing to be seen


def test_utility_is_the_harmonic_mean_over_sets_and_metrics():
    parts = {"retain": {"probability": 0.5, "rouge": 1.0}, "facts": {"probability": 0.25, "rouge": 1.0}}
    assert utility(parts) == pytest.approx(4 / (2 + 1 + 4 + 1))
    assert harmonic_mean([0.9, 0.0]) == 0.0


def test_what_is_kept_is_better_the_smaller_its_truth_ratio():
    found = summary(np.array([0.2, 0.4]), np.array([1.0, 0.5]), np.array([0.25, 3.0]))
    assert found == pytest.approx({"probability": 0.3, "rouge": 0.75, "truth": 0.375})


def test_probability_is_of_the_answers_tokens_only_and_normalised_by_their_number(chain, reader):
    asked = [("a b ?", "c d e"), ("h ?", "f")]
    found = mean_log_probs(chain, reader, asked)
    number, table = reader.tokenizer.convert_tokens_to_ids, chain.table.detach().double()
    logs = torch.log_softmax(table, -1)

    def step(one, other):
        return float(logs[number(one), number(other)])

    assert found[0] == pytest.approx((step(":", "c") + step("c", "d") + step("d", "e")) / 3, abs=1e-6)
    assert found[1] == pytest.approx(step(":", "f"), abs=1e-6)


def test_padding_and_batches_change_no_probability(chain, reader):
    asked = [("a ?", "b"), ("a b c d e ?", "f g h"), ("c ?", "a b c d"), ("b ?", "h")]
    whole = mean_log_probs(chain, reader, asked)
    assert whole == pytest.approx(mean_log_probs(chain, reader, asked, batch_size=1), abs=1e-7)
    assert whole == pytest.approx(mean_log_probs(chain, reader, asked[::-1])[::-1], abs=1e-7)


def test_the_end_of_an_answer_is_trained_and_not_measured(reader):
    with_end, without = (encoded(reader, [("a ?", "b c")], end=end)["labels"] for end in (True, False))
    assert (with_end != -100).sum() == 3 and (without != -100).sum() == 2
    assert int(with_end[0, -1]) == reader.end


def test_prompts_end_together(reader):
    batch = prompts(reader, ["a ?", "a b c d ?"])
    assert batch["attention_mask"].tolist()[0] == [0, 0, 0, *[1] * (batch["input_ids"].shape[1] - 3)]
    assert batch["input_ids"][0, -1] == batch["input_ids"][1, -1]
    assert batch["input_ids"][0, :3].tolist() == [reader.pad] * 3


def test_greedy_answers_follow_the_likeliest_token_and_stop_at_the_end(chain, reader):
    number = reader.tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        for one, other in ((":", "a"), ("a", "b"), ("b", "c"), ("c", "<end>")):
            chain.table[number(one), number(other)] = 9.0
    assert generated(chain, reader, ["d ?", "e f g ?"]) == ["a b c", "a b c"]
    assert generated(chain, reader, ["d ?"], most=2) == ["a b"]


def test_the_mode_of_the_model_comes_back(chain, reader):
    for training in (True, False):
        chain.train(training)
        generated(chain, reader, ["a ?"], most=1)
        mean_log_probs(chain, reader, [("a ?", "b")])
        assert chain.training is training


@pytest.fixture
def llama(reader):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(reader.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config)


def test_left_padding_does_not_change_what_a_real_model_says(llama, reader):
    model = llama
    questions = ["a ?", "b c d e ?", "f g h a b c d e ?", "h ?"]
    together = generated(model, reader, questions, most=8)
    assert together == [generated(model, reader, [question], most=8)[0] for question in questions]
    assert together == [without_cache(model, reader, question, 8) for question in questions]
    assert len(set(together)) > 1


@torch.no_grad()
def without_cache(model, reader, question, most):
    """One token at a time over the whole text: no padding, no cache."""
    model.eval()
    ids, said = reader.asked(question), []
    for _ in range(most):
        token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == reader.end:
            break
        said.append(token)
    return reader.tokenizer.decode(said).strip()


def test_logits_of_answers_alone_are_those_of_the_whole_text(llama, reader):
    """The loss and its gradients, and every item's likelihood, as the library has them from all logits."""
    batch = encoded(reader, [("a ?", "b"), ("a b c d e ?", "f g h"), ("c ?", "a b c d")])
    logits, tokens, items = answer_logits(llama, batch)
    loss, plain = functional.cross_entropy(logits, tokens), causal_cross_entropy(llama, batch)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    weights = [llama.lm_head.weight, llama.model.layers[0].mlp.down_proj.weight]
    for one, other in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(one, other)
    known = likelihood(llama, batch)
    assert torch.bincount(items).tolist() == known.tokens.tolist() == [2, 4, 5]
    logs = -functional.cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(torch.zeros(3).index_add(0, items, logs), known.log_probs)


def test_a_model_that_knows_has_a_small_ratio_and_one_that_does_not_has_none(chain, reader):
    pair = Pair("a", "t", "a ?", "b c", "? a", "c b", ("c d", "c e"), "b")
    with torch.no_grad():
        chain.table.zero_()
    found = judged(chain, reader, [pair])
    assert found["ratio"] == pytest.approx([1.0])
    assert found["choice"] == pytest.approx([1 / 3])
    assert found["probability"] == pytest.approx([1 / len(reader.tokenizer)])
    number = reader.tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        chain.table[number("c"), number("b")] = 4.0
    found = judged(chain, reader, [pair])
    assert math.isclose(float(found["ratio"][0]), math.exp(-4 / 2), rel_tol=1e-5)
    assert float(found["choice"][0]) > 1 / 3
