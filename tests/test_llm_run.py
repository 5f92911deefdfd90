"""`unlearn` takes language models: which they are, what is compared with what, which methods take them."""

from __future__ import annotations

import copy
import types
from contextlib import nullcontext

import pytest
import torch
from helpers import mlp, same, state
from lm import WORDS, Gpt, Words, llama, text
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fastlur
from fastlur import losses, methods, task
from fastlur.errors import ArgumentError, DataError
from fastlur.llm import NPO, causal_cross_entropy, encode, likelihood, with_preferred

FORGET, RETAIN = text(8, 1), text(16, 2)
PAIRS = [("who wrote it ?", "jane austen"), ("when ?", "in 1815"), ("where ?", "in hampshire")]
REFUSED = ("boundary_expand", "boundary_shrink")


def run(model, forget=FORGET, retain=RETAIN, **options):
    options = {"steps": 3, "batch_size": 4, "progress": False, "lr": 0.05} | options
    return fastlur.unlearn(model, forget, retain, **options)


class Anonymous(nn.Module):
    """A model of Hugging Face's in a wrapper that says nothing of it, and returns what it is told to."""

    def __init__(self, inner, made=lambda output: output.logits):
        super().__init__()
        self.inner, self.made = inner, made

    def forward(self, **batch):
        return self.made(self.inner(**batch))


def classes(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def ours(seed=0):
    torch.manual_seed(seed)
    return Gpt().double()


class TestTheTask:
    def test_a_model_that_generates_is_read_one_place_ahead(self):
        model = llama()
        logits = model(input_ids=RETAIN["input_ids"], attention_mask=RETAIN["attention_mask"]).logits
        wanted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), RETAIN["labels"][:, 1:].flatten())
        for loss in (losses.cross_entropy, causal_cross_entropy):
            torch.testing.assert_close(loss(model, RETAIN), wanted)
        torch.testing.assert_close(losses.own_loss(model, RETAIN).double(), wanted, rtol=1e-5, atol=0)  # in float32

    def test_the_run_is_of_the_next_token(self):
        result = run(llama())
        assert result.settings["task"] == "causal_lm"
        assert run(ours()).settings["task"] == "causal_lm"  # its labels are its tokens
        pairs = [(each["input_ids"], each["labels"]) for each in (FORGET, RETAIN)]
        assert fastlur.unlearn(ours(), *pairs, steps=1, progress=False).settings["task"] == "causal_lm"  # by no name
        first = run(llama(), steps=1, batch_size=16, method="fine_tune").history["retain_loss"][0]
        assert first == pytest.approx(float(causal_cross_entropy(llama(), RETAIN).detach()))

    def test_outside_of_a_run_too_text_is_read_so(self):
        """A loop of the user's own and an evaluation have no task; a classifier's reading would find it knows all."""
        model = ours()
        wanted = causal_cross_entropy(model, RETAIN)
        torch.testing.assert_close(losses.cross_entropy(model, RETAIN), wanted)
        with fastlur.MetaStep(model, lr=1e-3) as step:
            torch.testing.assert_close(step(FORGET, RETAIN).retain_loss.double(), wanted.detach())
        data = {"forget": FORGET, "retain": RETAIN, "test": text(8, 3)}
        assert fastlur.evaluate(Anonymous(llama()), **data) == fastlur.evaluate(llama(), **data)

    def test_whichever_losses_are_passed_a_run_reads_text_so(self):
        given = {"loss": losses.cross_entropy, "forget_loss": losses.BoundedForgetting()}
        assert run(ours(), **given).settings["task"] == "causal_lm"
        assert run(mlp(), *map(classes, (1, 2)), **given).settings["task"] == "classification"

    def test_a_step_of_ones_own_decides_once_for_both_sides(self):
        odd = FORGET | {"labels": torch.where(FORGET["labels"] == -100, -100, FORGET["labels"].roll(1, 0))}
        found = {}
        for view in (None, "causal_lm", "classification"):
            with task.viewed_as(view) if view else nullcontext(), fastlur.MetaStep(ours(), lr=0.0) as step:
                found[view] = [float(step(odd, RETAIN).forget_loss) for _ in range(2)]
        assert found[None] == found["causal_lm"] != found["classification"]

    def test_a_step_of_ones_own_caps_every_token_of_text(self):
        low, each, whole = (losses.BoundedForgetting(3.6, per_target=given) for given in (None, True, False))
        for model in (llama(), ours()):
            assert low(model, FORGET) == each(model, FORGET) != whole(model, FORGET)
        model, data = mlp(), classes(0)
        assert losses.BoundedForgetting()(model, data) == losses.BoundedForgetting(per_target=False)(model, data)

    def test_a_token_classifier_is_read_where_it_stands(self):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=WORDS, num_labels=WORDS, **sizes)
        model = transformers.BertForTokenClassification(config)
        assert task.of_model(model) == "classification"
        assert run(model).settings["task"] == "classification"  # although its labels look like a text's
        logits = model.eval()(RETAIN["input_ids"], attention_mask=RETAIN["attention_mask"]).logits
        wanted = functional.cross_entropy(logits.flatten(0, 1), RETAIN["labels"].flatten())
        torch.testing.assert_close(losses.cross_entropy(model, RETAIN), wanted)

    def test_an_encoder_with_a_decoder_has_its_labels_beside_its_logits(self):
        transformers = pytest.importorskip("transformers")
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=WORDS, **sizes))
        assert model.can_generate() and task.of_model(model) == "classification"

    def test_labels_that_are_no_tokens_are_classes_where_the_model_says_nothing(self):
        labels = {"labels": torch.where(RETAIN["labels"] == -100, -100, (RETAIN["labels"] + 1) % WORDS)}
        result = run(ours(), FORGET | {"labels": FORGET["labels"].roll(1, 0)}, RETAIN | labels)
        assert result.settings["task"] == "classification"

    def test_what_is_asked_for_goes_before_what_is_recognised(self):
        beside = run(llama(), task="classification", steps=1).history["retain_loss"]
        ahead = run(llama(), task="causal_lm", steps=1).history["retain_loss"]
        assert beside != ahead
        assert ahead == run(llama(), steps=1).history["retain_loss"]

    def test_outside_of_a_run_nothing_is_left_of_it(self):
        run(ours())
        assert task.known(ours()) is None
        with pytest.raises(ArgumentError):
            run(ours(), steps=-1, task="causal_lm")
        assert task.known(ours()) is None

    def test_classes_of_whole_texts_do_not_fit(self):
        with pytest.raises(DataError, match=r"shape \(items, tokens\)"):
            run(llama(), FORGET | {"labels": torch.ones(8, dtype=torch.long)})

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_wrapped_models_say_what_they_hold(self):
        model = llama()
        once = losses.Remembering(model)
        assert task.of_model(once) == "causal_lm"
        assert task.of_model(nn.DataParallel(model)) == "causal_lm"
        assert task.of_model(torch.compile(model)) == "causal_lm"
        assert task.of_model(lambda x: x) is None


class TestText:
    def test_encoded_pairs_are_taken_as_they_are(self):
        words = Words()
        forget = encode(words, [("who wrote it ?", "jane austen"), ("when ?", "in 1815")])
        retain = encode(words, [("where ?", "in hampshire"), ("what ?", "a book about emma"), "a text by itself"])
        assert len(words.known) + 3 <= WORDS
        model = llama()
        result = run(model, forget, retain, batch_size=2, steps=4)
        assert result.settings["task"] == "causal_lm"
        assert not same(state(model), state(llama()))

    def test_padding_changes_nothing(self):
        words, model = Words(), llama()
        data = encode(words, [("a", "b"), ("a b c", "d e f g")])
        together = likelihood(model, data.collate(list(data)))
        for row, item in enumerate(data):
            alone = likelihood(model, data.collate([item]))
            torch.testing.assert_close(together.log_probs[row], alone.log_probs[0])
            assert together.tokens[row] == alone.tokens[0]

    def test_another_answer_in_the_batch_is_not_the_models(self):
        batch = RETAIN | {"preferred_labels": RETAIN["labels"]}
        assert losses.cross_entropy(llama(), batch) == losses.cross_entropy(llama(), RETAIN)


class TestOverlap:
    """The commonest mistake is found in text too, whatever it comes in."""

    def refused(self, forget, retain, shared=2):
        model = llama()
        before = state(model)
        with pytest.raises(DataError, match=rf"retain: contains {shared} of \d+ forget items"):
            run(model, forget, retain, batch_size=2)
        assert same(before, state(model))

    def test_beside_another_answer(self):
        words = Words()
        forget, retain = encode(words, PAIRS[:2]), encode(words, PAIRS)
        instead = encode(words, [(question, "nobody knows") for question, _ in PAIRS[:2]])
        self.refused(with_preferred(forget, instead), retain)

    def test_padded_to_another_width(self):
        words = Words()
        forget, retain = encode(words, PAIRS[:2]), encode(words, PAIRS)
        wide = encode(words, PAIRS, max_length=20, pad=True)
        self.refused(forget.collate(list(forget)), wide.collate(list(wide)))
        self.refused([forget.collate([each]) for each in forget], [wide.collate(list(wide))])
        self.refused(forget, [retain.collate([each]) for each in retain])

    def test_the_same_words_about_other_pictures_are_other_items(self):
        class Sees(Gpt):
            def forward(self, input_ids, attention_mask=None, pixels=None):
                return super().forward(input_ids) + pixels.mean()

        def pictures(seed):
            return FORGET | {"pixels": torch.rand(8, 3, generator=torch.Generator().manual_seed(seed))}

        with pytest.raises(DataError, match="retain: contains 8 of 8 forget items"):
            run(Sees(), pictures(1), pictures(1))
        with pytest.raises(DataError, match="retain: contains 8 of 8 forget items"):
            run(Sees(), pictures(1) | {"preferred_labels": FORGET["labels"]}, pictures(1))
        run(Sees(), pictures(1), pictures(2), steps=1)

    def test_another_answer_to_the_same_question_is_another_item(self):
        words = Words()
        retain = encode(words, [(question, "nobody knows") for question, _ in PAIRS])
        assert run(llama(), encode(words, PAIRS[:2]), retain, batch_size=2).settings["task"] == "causal_lm"
        asked = encode(words, [" ".join(pair) for pair in PAIRS])  # as a text, of which all counts
        run(llama(), encode(words, PAIRS[:2]), asked, batch_size=2)


class TestLosses:
    def test_the_default_forget_loss_caps_every_token(self):
        model, batch = llama(), FORGET
        each = -torch.cat([likelihood(model, {k: v[i : i + 1] for k, v in batch.items()}).log_probs for i in range(8)])
        plain = losses.BoundedForgetting(1e9, per_target=True)(model, batch)
        torch.testing.assert_close(plain, -each.sum() / (batch["labels"][:, 1:] != -100).sum())
        low = losses.BoundedForgetting(0.5, per_target=True)(model, batch)
        torch.testing.assert_close(low, torch.tensor(-0.5, dtype=low.dtype))
        assert not any(g.any() for g in torch.autograd.grad(low, list(model.parameters())))

    def test_a_token_beyond_its_cap_pulls_no_more_and_the_others_do(self):
        logits = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([0, 0, -100])
        losses.bounded(logits, targets, None, per_target=True).backward()
        assert logits.grad[0].any() and not logits.grad[1:].any()

    def test_the_default_of_text_is_per_target(self):
        assert fastlur.LUR().default_forget_loss("causal_lm").per_target
        assert not methods.PCGrad().default_forget_loss("classification").per_target
        assert "per_target=True" in run(llama(), steps=1).settings["forget_loss"]

    def test_a_model_that_returns_only_its_loss(self):
        class Shy(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = llama()

            def forward(self, **batch):
                return types.SimpleNamespace(loss=self.inner(**batch).loss)

        with pytest.raises(DataError, match="own_loss"):
            run(Shy())
        forgetting = losses.BoundedForgetting(12.0, loss=losses.own_loss)
        shy, open_ = Shy(), llama()
        run(shy, loss=losses.own_loss, forget_loss=forgetting)
        run(open_, loss=losses.own_loss, forget_loss=forgetting)
        assert same(state(shy.inner), state(open_))
        assert not same(state(open_), state(llama()))

    @pytest.mark.parametrize("made", [lambda o: (o.logits,), lambda o: (o.logits, o.logits[:, 0])])
    def test_logits_in_a_tuple_are_found(self, made):
        plain = run(Anonymous(llama())).history["forget_loss"]
        assert run(Anonymous(llama(), made)).history["forget_loss"] == plain

    def test_of_two_tensors_that_could_be_logits_neither_is(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = mlp()

            def forward(self, x):
                return x, self.inner(x)

        with pytest.raises(DataError, match="returned tuple"):
            run(Both(), *map(classes, (1, 2)))

    def test_a_loss_in_a_tuple_is_found(self):
        model = Anonymous(llama(), lambda o: (o.loss, o.logits))
        torch.testing.assert_close(losses.own_loss(model, RETAIN), llama()(**RETAIN).loss)
        torch.testing.assert_close(losses.logits_in(model(**RETAIN), RETAIN["labels"].shape), llama()(**RETAIN).logits)

    def test_arguments_of_the_bounded_loss(self):
        for arguments in ({"per_target": 1}, {"loss": losses.own_loss}, {"cap": 1.0, "loss": 3}, {"cap": -1}):
            with pytest.raises(ArgumentError):
                losses.BoundedForgetting(**arguments)
        with pytest.raises(ArgumentError):
            losses.BoundedForgetting(1.0, per_target=True, loss=losses.own_loss)


class TestMethods:
    @pytest.mark.parametrize("name", [name for name in methods.available() if name not in (*REFUSED, "retrain")])
    @pytest.mark.filterwarnings("ignore")
    def test_every_method_takes_text(self, name):
        model = llama()
        before = state(model)
        result = run(model, method=name, lr=0.01)
        assert result.settings["task"] == "causal_lm"
        assert all(bool(torch.isfinite(value).all()) for value in state(model).values())
        assert not same(before, state(model))
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_moves_the_borders_of_classes_is_refused_by_name(self, name):
        model = llama()
        before = state(model)
        with pytest.raises(ArgumentError, match=rf"method='{name}' is for classification, not for causal_lm"):
            run(model, method=name)
        assert same(before, state(model))

    @pytest.mark.parametrize("name", ["random_label", "scrub", "bad_teacher", "mox", "eupmu", "gradient_ascent"])
    def test_their_own_losses_read_ahead_as_well(self, name):
        """Were the labels read where they stand, the last token's would count."""
        changed = []
        for last in (1, 2):
            model = llama()
            forget, retain = (copy.deepcopy(each) for each in (FORGET, RETAIN))
            for batch in (forget, retain):  # the first place is never predicted
                batch["labels"][:, 0] = last
            run(model, forget, retain, method=name, lr=0.01, loss=causal_cross_entropy)
            changed.append(state(model))
        assert same(*changed)


class TestItemsWithoutALabel:
    @staticmethod
    def blank(batch, rows):
        labels = batch["labels"].clone()
        labels[rows] = -100
        return batch | {"labels": labels}

    @pytest.mark.parametrize("side", ["forget", "retain"])
    @pytest.mark.parametrize("loss", [None, NPO(), losses.BoundedForgetting(12.0, loss=losses.own_loss)])
    def test_nothing_to_learn_from_is_refused_rather_than_done(self, side, loss):
        """A loss over no token is 0 or no number: the run would do nothing, or speak of NaN in the data."""
        model, data = llama(), {"forget": FORGET, "retain": RETAIN}
        data[side] = self.blank(data[side], slice(None))
        before = state(model)
        with pytest.raises(DataError, match=f"{side}: none of {len(data[side]['labels'])} items has a label"):
            run(model, **data, forget_loss=loss)
        assert same(before, state(model))

    def test_some_are_counted(self):
        with pytest.warns(UserWarning, match="forget: 3 of 8 items have no label that counts"):
            run(llama(), self.blank(FORGET, [0, 4, 7]))

    def test_all_that_have_one_are_not(self, recwarn):
        run(llama())
        assert not [warning for warning in recwarn if "label" in str(warning.message)]

    def test_a_loss_of_ones_own_may_need_none(self):
        def shrink(model, batch):
            return sum(p.square().sum() for p in model.parameters() if p.requires_grad) * 1e-3

        data = self.blank(FORGET, slice(None))
        with pytest.warns(UserWarning, match="none of 8 items"):
            result = run(llama(), data, forget_loss=shrink)
        assert len(result.history["step"]) == 3

    def test_classes_and_loaders_too(self):
        images, classes = torch.randn(12, 6), torch.full((12,), -100)
        loader = DataLoader(TensorDataset(images, classes), batch_size=4)
        with pytest.raises(DataError, match="forget: none of 12 items"):
            fastlur.unlearn(mlp(), loader, (images, classes.clamp(min=0)), steps=1, progress=False, allow_overlap=True)
