"""Forget losses of text: their formulas against float64 spelled out item by item, and the cases at their edges."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_lm import F64, TinyLM, answers, learned, padded, rows, texts, to_the_left
from torch.nn import functional

import fastlur
from fastlur.llm import DPO, IDK, NPO, ReferenceKL, SimNPO, reference_log_probs, refusals, with_preferred
from fastlur.llm.likelihood import likelihood


@pytest.fixture
def model():
    return TinyLM()


@pytest.fixture
def given():
    """The reference, another model."""
    torch.manual_seed(7)
    return TinyLM()


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


def same_gradients(found, wanted, model, rtol=1e-9):
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10, abs=1e-12)
    for a, b in zip(gradients(found, model), gradients(wanted, model), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-11)


def npo(model, given, batch, beta):
    (p, _), (q, _) = answers(model, batch), answers(given, batch)
    ratio = (p - q.detach()).exp() ** beta
    return 2 / beta * (1 + ratio).log().mean()


def simnpo(model, batch, beta, gamma):
    p, lengths = answers(model, batch)
    return -2 / beta * torch.sigmoid(-beta * p / lengths - gamma).log().mean()


def dpo(model, given, true, other, beta):
    ratios = [answers(model, each)[0] - answers(given, each)[0].detach() for each in (other, true)]
    return -2 / beta * torch.sigmoid(beta * (ratios[0] - ratios[1])).log().mean()


def reference_kl(model, given, batch):
    found = []
    for ids, labels in rows(batch):
        p, q = given(ids[None]).softmax(-1)[0].detach(), model(ids[None]).softmax(-1)[0]
        found += [(p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum() for i in range(1, len(ids)) if labels[i] != -100]
    return torch.stack(found).mean()


class TestNPO:
    @pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
    def test_is_its_formula(self, model, given, beta):
        batch = texts(7)
        loss = NPO(beta, reference_log_probs(given, batch))
        same_gradients(loss(model, batch), npo(model, given, batch, beta), model)

    @pytest.mark.parametrize("beta", [0.05, 2.0])
    def test_at_the_reference_it_is_a_constant_with_the_gradient_of_the_log_likelihood(self, model, beta):
        batch = texts(7)
        value = NPO(beta, reference_log_probs(model, batch))(model, batch)
        assert float(value.detach()) == pytest.approx(2 / beta * math.log(2))
        plain = answers(model, batch)[0].mean()
        for a, b in zip(gradients(value, model), gradients(plain, model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    def test_as_beta_goes_to_zero_it_is_plain_ascent(self, model, given):
        batch = texts(7)
        plain = gradients(answers(model, batch)[0].mean(), model)
        reference = reference_log_probs(given, batch)
        off = []
        for beta in (1e-2, 1e-3, 1e-4):
            found = gradients(NPO(beta, reference)(model, batch), model)
            off.append(max(float((a - b).abs().max()) for a, b in zip(found, plain, strict=True)))
        assert off[2] < 1e-3
        assert off[1] / off[2] == pytest.approx(10, rel=0.05)  # linearly
        assert off[0] / off[1] == pytest.approx(10, rel=0.05)

    def test_stands_for_the_model_as_it_is_until_there_is_a_reference(self, model):
        batch = texts(4)
        assert float(NPO(1.0)(model, batch).detach()) == pytest.approx(2 * math.log(2))

    def test_does_not_overflow_however_far_the_model_is(self, model, given):
        batch = texts(5)
        reference = reference_log_probs(given, batch)
        for far in (-1e5, 1e5):
            away = type(reference)(reference.keys, reference.log_probs + far)
            value = NPO(4.0, away)(model, batch)
            assert torch.isfinite(value)
            assert all(torch.isfinite(g).all() for g in gradients(value, model))


class TestSimNPO:
    @pytest.mark.parametrize(("beta", "gamma"), [(2.5, 0.0), (0.5, 1.5)])
    def test_is_its_formula(self, model, beta, gamma):
        batch = texts(7)
        same_gradients(SimNPO(beta, gamma)(model, batch), simnpo(model, batch, beta, gamma), model)

    def test_an_answer_of_one_token_is_not_divided(self, model):
        batch = texts(1)
        assert int((batch["labels"] != -100).sum()) == 1
        p = likelihood(model, batch).log_probs[0]
        assert float(SimNPO(1.0)(model, batch).detach()) == pytest.approx(float(2 * functional.softplus(p.detach())))

    def test_does_not_look_at_how_long_answers_are_in_all(self, model):
        """Twice as many tokens, each as likely as before, give the same loss; of NPO they do not."""
        logits = torch.zeros(1, 9, 13, dtype=F64)
        short = {"input_ids": torch.ones(1, 5, dtype=torch.long), "labels": torch.tensor([[-100, 1, 1, -100, -100]])}
        long = {
            "input_ids": torch.ones(1, 9, dtype=torch.long),
            "labels": torch.tensor([[-100, 1, 1, 1, 1] + 4 * [-100]]),
        }
        flat = lambda input_ids: logits[:, : input_ids.shape[1]]
        assert float(SimNPO()(flat, short)) == pytest.approx(float(SimNPO()(flat, long)))


class TestDPO:
    @pytest.mark.parametrize("beta", [0.1, 2.0])
    def test_is_its_formula(self, model, given, beta):
        true, other = texts(6), texts(6, longest=5, seed=3, asked=0)
        batch = with_preferred(true, other)
        loss = DPO(beta, reference_log_probs(given, batch))
        same_gradients(loss(model, batch), dpo(model, given, true, other, beta), model)

    def test_at_the_reference_it_is_the_same_constant_as_npo(self, model):
        batch = with_preferred(texts(6), texts(6, seed=3, asked=0))
        assert float(DPO(0.5, reference_log_probs(model, batch))(model, batch).detach()) == pytest.approx(
            4 * math.log(2)
        )

    def test_an_answer_that_is_its_own_alternative_has_no_gradient(self, model, given):
        batch = with_preferred(texts(6), texts(6))
        value = DPO(0.5, reference_log_probs(given, batch))(model, batch)
        assert max(float(g.abs().max()) for g in gradients(value, model)) < 1e-12

    @pytest.mark.parametrize("loss", [DPO(), IDK()])
    def test_a_batch_without_other_answers_is_refused(self, model, loss):
        with pytest.raises(fastlur.DataError, match=r"preferred_input_ids.*with_preferred"):
            loss(model, texts(4))

    def test_idk_is_the_cross_entropy_of_the_other_answers(self, model):
        true, other = texts(6), texts(6, longest=5, seed=3, asked=0)
        p, lengths = answers(model, other)
        same_gradients(IDK()(model, with_preferred(true, other)), -p.sum() / lengths.sum(), model)


class TestReferenceKL:
    def test_is_its_formula(self, model, given):
        batch = texts(7)
        kept = ReferenceKL(weight=0.7, cross_entropy=0.3)
        logits, before = model(**inputs(batch))[:, :-1], given(**inputs(batch))[:, :-1].detach()
        p, lengths = answers(model, batch)
        wanted = 0.7 * reference_kl(model, given, batch) - 0.3 * p.sum() / lengths.sum()
        same_gradients(kept.of(logits, before, batch["labels"][:, 1:]), wanted, model)

    def test_at_the_reference_it_is_nothing_and_has_no_gradient(self, model):
        value = ReferenceKL()(model, texts(6))
        assert abs(float(value.detach())) < 1e-14
        assert max(float(g.abs().max()) for g in gradients(value, model)) < 1e-14


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize(
    "moved", [lambda b: padded(b, 3), to_the_left, lambda b: to_the_left(b, 2)], ids=["right", "left", "more"]
)
@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo", "idk", "kl"])
def test_padding_makes_no_difference(model, given, name, moved):
    true, other = texts(6), texts(6, longest=5, seed=3, asked=0)
    batch = with_preferred(true, other)
    reference = reference_log_probs(given, batch)
    kl = lambda m, b: ReferenceKL().of(m(**inputs(b))[:, :-1], given(**inputs(b))[:, :-1].detach(), b["labels"][:, 1:])
    losses = {"npo": NPO(0.3, reference), "simnpo": SimNPO(), "dpo": DPO(0.3, reference), "idk": IDK(), "kl": kl}
    loss = losses[name]
    if name == "kl":
        same_gradients(loss(model, moved(true)), loss(model, true), model)
        return
    same_gradients(loss(model, with_preferred(moved(true), moved(other))), loss(model, batch), model)


@pytest.mark.parametrize("name", ["npo", "simnpo", "dpo"])
def test_gradients_are_those_of_the_loss(given, name):
    """Against differences along a random direction."""
    model = TinyLM(width=4, blocks=1)
    batch = with_preferred(texts(4), texts(4, seed=3, asked=0))
    reference = reference_log_probs(TinyLM(), batch)
    loss = {"npo": NPO(0.8, reference), "simnpo": SimNPO(0.8, 0.2), "dpo": DPO(0.8, reference)}[name]
    params = list(model.parameters())
    along = [torch.randn_like(p) for p in params]
    slope = sum((g * v).sum() for g, v in zip(gradients(loss(model, batch), model), along, strict=True))

    def at(h):
        moved = copy.deepcopy(model)
        for p, v in zip(moved.parameters(), along, strict=True):
            p.data += h * v
        return float(loss(moved, batch).detach())

    assert (at(1e-5) - at(-1e-5)) / 2e-5 == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NPO(0), "beta=0"),
        (lambda: NPO(float("nan")), "beta=nan"),
        (lambda: NPO(0.1, {"a": 1}), r"reference: a dict.*reference_log_probs"),
        (lambda: DPO(-1), "beta=-1"),
        (lambda: SimNPO(gamma=-0.1), r"gamma=-0\.1"),
        (lambda: SimNPO(beta="1"), "beta='1'"),
        (lambda: ReferenceKL(weight=-1), "weight=-1"),
        (lambda: ReferenceKL(weight=0), "nothing to minimise"),
        (lambda: ReferenceKL(keep="copies"), "did you mean 'copy'"),
        (lambda: refusals(0), "count=0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        make()


class TestPreferred:
    def test_refusals_are_the_same_for_the_same_seed(self):
        assert refusals(9, 3) == refusals(9, 3)
        assert refusals(9, 3) != refusals(9, 4)
        assert len(set(refusals(200))) > 10

    def test_what_does_not_pair_up_is_refused(self):
        with pytest.raises(fastlur.DataError, match=r"\[5\] rows for \[6\]"):
            with_preferred(texts(6), texts(5))
        with pytest.raises(fastlur.ArgumentError, match="encode"):
            with_preferred(texts(6), [1, 2])

    def test_another_question_is_refused_however_it_is_padded(self):
        """Else its answer would be taught to the question that it is laid beside."""
        true, other = texts(6), texts(6, seed=3, asked=0)
        with_preferred(to_the_left(true, 2), other)
        with_preferred(true | {"labels": torch.full_like(true["labels"], -100)}, other)  # without an answer: no prompt
        wrong = {name: value.clone() for name, value in other.items()}
        wrong["input_ids"][4, 1] += 1
        for forget, preferred in ((true, wrong), (encoded(true), encoded(wrong))):
            with pytest.raises(fastlur.DataError, match="item 4 has another prompt"):
                with_preferred(forget, preferred)

    def test_encoded_data_pair_up_and_pad_each_answer_by_itself(self):
        made = [encoded(texts(5)), encoded(texts(5, longest=5, seed=2, asked=0))]
        both = with_preferred(*made)
        batch = both.collate([both[i] for i in range(5)])
        for prefix, data in zip(("", "preferred_"), made, strict=True):
            for name, value in data.collate([data[i] for i in range(5)]).items():
                assert torch.equal(batch[prefix + name], value)
        assert len(both.subset([3, 1])) == 2
        assert torch.equal(both.subset([3, 1])[0]["preferred_input_ids"], made[1][3]["input_ids"])
        with pytest.raises(fastlur.DataError, match="4 items for 5"):
            with_preferred(made[0], made[1].subset(range(4)))


def encoded(batch):
    items = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels} for ids, labels in rows(batch)
    ]
    return fastlur.llm.Encoded(items, padding=0)


@pytest.fixture(scope="module")
def taught():
    """A model that knows a forget and a retain set."""
    return learned(texts(8), texts(8, seed=9), steps=150)


@pytest.mark.parametrize(
    ("loss", "forgets", "prefers"),
    [(NPO(), 4, None), (SimNPO(), 0.4, None), (DPO(), 8, 8), (IDK(), 2, 8)],
    ids=["NPO", "SimNPO", "DPO", "IDK"],
)
def test_a_run_takes_answers_away_and_brings_preferred_ones(loss, forgets, prefers, taught):
    """In nats an answer, against a run that only retains; what is retained stays likely."""
    forget, retain = with_preferred(texts(8), texts(8, seed=5, asked=0)), texts(8, seed=9)
    asked = texts(8), texts(8, seed=5), retain
    options = {"steps": 30, "lr": 0.1, "progress": False, "loss": fastlur.llm.causal_cross_entropy}
    found = []
    for weight in (0.0, 0.3):
        model, method = copy.deepcopy(taught), fastlur.LUR(forget_weight=weight)
        fastlur.unlearn(model, forget, retain, method=method, forget_loss=loss, **options)
        found.append([float(likelihood(model, each).log_probs.detach().mean()) for each in asked])
    (known, unlikely, _), (gone, instead, kept) = found
    assert known > -0.1
    assert gone <= known - forgets
    assert prefers is None or instead > unlikely + prefers
    assert kept > -0.2


def test_a_loss_serves_in_a_loop_of_ones_own():
    forget, retain = with_preferred(texts(8), texts(8, seed=5, asked=0)), texts(8, seed=9)
    model = TinyLM()
    loss = NPO(0.5, reference_log_probs(model, forget))
    assert float(loss(model, forget).detach()) == pytest.approx(
        4 * math.log(2)
    )  # of the model as given, whatever it is
    with fastlur.MetaStep(model, fastlur.llm.causal_cross_entropy, loss, lr=0.1) as step:
        values = [float(step(forget, retain).forget_loss) for _ in range(5)]
    assert values[-1] < values[0] - 0.5
