"""Collapse: what is drawn, what is chosen, what is trained on, and that a resumed run draws the same."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import of_both, same
from tiny_lm import TinyLM, answers, padded, rows, texts, to_the_left

import fastlur
from fastlur.llm import Collapse, causal_cross_entropy, unlikeness
from fastlur.llm.likelihood import likelihood
from fastlur.llm.sampling import sample


class TestUnlikeness:
    @pytest.mark.parametrize(
        ("answer", "true", "wanted"),
        [
            ([1, 2, 3], [1, 2, 3], 0.0),
            ([4, 5], [1, 2, 3], 1.0),
            ([], [1, 2], 1.0),
            ([3, 2, 1], [1, 2, 3], 2 / 3),
            ([1, 9, 2, 9, 3, 9], [1, 2, 3], 0.0),
            ([2, 1, 2], [1, 2, 2, 4], 0.5),
            ([1], [], 1.0),
        ],
    )
    def test_is_the_share_of_the_true_answer_that_is_not_said_in_order(self, answer, true, wanted):
        assert unlikeness(answer, true) == pytest.approx(wanted)


class Certain:
    """A model whose next token is the last plus one, whatever stands before it; it notes what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, attention_mask=None):
        self.asked.append((input_ids.clone(), attention_mask))
        return torch.nn.functional.one_hot((input_ids + 1) % 13, 13).double() * 100


class TestSampling:
    def test_prompts_go_on_where_they_end(self):
        model = Certain()
        found = sample(model, [[1, 2, 3], [7]], 4)
        assert found == [[4, 5, 6, 7], [8, 9, 10, 11]]
        ids, mask = model.asked[1]
        assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert ids[1, :2].tolist() == [7, 8]

    def test_logits_are_found_in_whatever_a_model_returns(self):
        for wrap in (lambda logits: {"logits": logits}, lambda logits: SimpleNamespace(logits=logits)):
            certain = Certain()
            model = lambda wrap=wrap, certain=certain, **asked: wrap(certain(**asked))
            assert sample(model, [[1, 2, 3], [7]], 3) == [[4, 5, 6], [8, 9, 10]]

    def test_an_answer_ends_with_the_end(self):
        assert sample(Certain(), [[1, 2, 3], [7]], 9, end=9) == [[4, 5, 6, 7, 8, 9], [8, 9]]
        model = Certain()
        sample(model, [[7], [8]], 9, end=9, masked=False)
        assert len(model.asked) == 2
        assert all(mask is None for _, mask in model.asked)

    def test_frequencies_are_those_of_the_model(self):
        model = TinyLM()
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([[3, 4]]))[0, -1] / 0.7, -1)
        drawn = sample(model, [[3, 4]] * 20_000, 1, temperature=0.7)
        counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=13) / 20_000
        assert float((counts - p).abs().max()) < 4 * 0.5 / 20_000**0.5

    def test_top_p_leaves_out_what_is_unlikely(self):
        logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        model = lambda input_ids: logits.expand(*input_ids.shape, 4)
        for top_p, wanted in ((0.4, {0}), (0.5, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
            drawn = sample(model, [[0]] * 500, 1, top_p=top_p, masked=False)
            assert {token for (token,) in drawn} == wanted


def objective(**options):
    return Collapse(**{"tokens": 4, "samples": 3} | options)


class TestChoice:
    def test_the_answer_that_the_reward_likes_best_is_trained_on(self):
        model, batch = TinyLM(), texts(6)
        made = objective().batch(model, batch, torch.Generator().manual_seed(5))
        prompts = [ids[labels == -100].tolist() for ids, labels in rows(batch)]
        true = [ids[labels != -100].tolist() for ids, labels in rows(batch)]
        drawn = sample(
            model, [p for p in prompts for _ in range(3)], 4, temperature=1.25, top_p=0.95,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        for number, (ids, labels) in enumerate(rows(made)):
            three = drawn[3 * number : 3 * number + 3]
            best = max(unlikeness(each, true[number]) for each in three)
            said = ids[labels != -100].tolist()
            assert ids[labels == -100].tolist() == prompts[number]
            assert said in three
            assert unlikeness(said, true[number]) == best

    def test_a_reward_of_ones_own_and_the_least_length_count(self):
        model, batch = TinyLM(), texts(6)
        longest = objective(end=2, samples=6, reward=lambda answer, true: len(answer))
        shortest = objective(end=2, samples=6, reward=lambda answer, true: -len(answer), shortest=2)
        for loss, wanted in ((longest, max), (shortest, None)):
            made = loss.batch(model, batch, torch.Generator().manual_seed(1))
            drawn = sample(
                model, [ids[labels == -100].tolist() for ids, labels in rows(batch) for _ in range(6)], 4, end=2,
                temperature=1.25, top_p=0.95, generator=torch.Generator().manual_seed(1),
            )  # fmt: skip
            for number, (ids, labels) in enumerate(rows(made)):
                said = [t for t in ids[labels != -100].tolist() if t != 2]
                lengths = [len([t for t in each if t != 2]) for each in drawn[6 * number : 6 * number + 6]]
                enough = [length for length in lengths if length >= 2]
                assert len(said) == (max(lengths) if wanted else min(enough) if enough else min(lengths))

    @pytest.mark.parametrize("moved", [lambda b: padded(b, 3), to_the_left])
    def test_padding_makes_no_difference(self, moved):
        model, batch = TinyLM(), texts(6)
        one, other = (objective().batch(model, b, torch.Generator().manual_seed(2)) for b in (batch, moved(batch)))
        assert same(one, other)

    def test_the_loss_is_the_cross_entropy_of_the_chosen_and_never_sees_the_true_answer(self):
        model, batch = TinyLM(), texts(6)
        torch.manual_seed(4)
        found = objective()(model, batch)
        torch.manual_seed(4)
        made = objective().batch(model, batch)
        p, lengths = answers(model, made)
        torch.testing.assert_close(found, -p.sum() / lengths.sum())
        for a, b in zip(
            torch.autograd.grad(found, list(model.parameters())),
            torch.autograd.grad(-p.sum() / lengths.sum(), list(model.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_an_item_without_a_prompt_is_refused(self):
        with pytest.raises(fastlur.DataError, match="no prompt"):
            objective()(TinyLM(), texts(3, prompt=0))


def run(model, **options):
    options = {"steps": 6, "lr": 0.1, "batch_size": 3, "progress": False} | options
    return fastlur.unlearn(
        model, texts(7), texts(9, seed=1), loss=causal_cross_entropy, forget_loss=objective(), **options
    )


class TestInARun:
    def test_answers_are_drawn_once_a_step_in_eval_mode(self):
        """`secant` passes over the forget data once, with `forget_first` twice; forwards of draws are in eval mode."""
        for order in ("retain_first", "forget_first"):
            model, seen = TinyLM(dropout=0.3), []
            model.register_forward_hook(
                lambda m, i, kw, o, seen=seen: seen.append((m.training, len(o))), with_kwargs=True
            )
            run(model, method=fastlur.LUR(gradient="secant", order=order), steps=4)
            drawing = [number for number, (training, size) in enumerate(seen) if size == 9]
            assert all(not seen[number][0] for number in drawing)
            assert len(drawing) == (4 + 1) * 4  # steps and the trial before them, 4 tokens each

    def test_an_interrupted_run_ends_the_same(self, tmp_path):
        model = TinyLM(dropout=0.2)
        assert same(*of_both(model, partial(run, model), tmp_path))

    def test_an_answer_that_was_certain_becomes_less_likely(self):
        torch.manual_seed(0)
        model, batch = TinyLM(width=16), texts(7)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            torch.autograd.backward(causal_cross_entropy(model, batch))
            optimizer.step()
        before = likelihood(model, batch).log_probs.detach().mean()
        run(model, steps=60, batch_size=7, lr=0.05, method=fastlur.LUR(forget_weight=1.0))
        assert likelihood(model, batch).log_probs.detach().mean() < before - 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"samples": 0}, "samples=0"),
        ({"tokens": 1.5}, r"tokens=1\.5"),
        ({"temperature": 0}, "temperature=0"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.2}, r"top_p=1\.2"),
        ({"end": -1}, "end=-1"),
        ({"shortest": None}, "shortest=None"),
        ({"reward": 3}, "reward: a int"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, said):
    with pytest.raises(fastlur.ArgumentError, match=said):
        Collapse(**wrong)
