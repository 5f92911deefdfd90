"""Text becomes tokens so that exactly the answer counts, and nothing is lost unseen."""

from __future__ import annotations

import pytest
import torch
from lm import Words
from torch.utils.data import DataLoader, Subset

from fastlur.data import source
from fastlur.errors import ArgumentError, DataError
from fastlur.llm import encode


def counted(item):
    return item["input_ids"][item["labels"] != -100]


def test_of_a_pair_the_answer_counts_and_the_token_that_ends_it():
    words = Words()
    (item,) = encode(words, [("who wrote it ?", "jane austen")])
    assert words.read(item["input_ids"]) == ["BEGIN", "who", "wrote", "it", "?", "jane", "austen", "END"]
    assert words.read(counted(item)) == ["jane", "austen", "END"]
    assert torch.equal(counted(item), item["labels"][item["labels"] != -100])
    assert item["attention_mask"].all()


def test_of_a_text_everything_counts():
    words = Words()
    (item,) = encode(words, ["once upon a time"])
    assert words.read(counted(item)) == ["BEGIN", "once", "upon", "a", "time", "END"]
    (item,) = encode(words, ["once upon a time"], end=False)
    assert words.read(counted(item))[-1] == "time"


def test_a_tokenizer_that_ends_every_text_ends_neither_the_prompt_nor_anything_twice():
    words = Words(ends=True)
    pair, text = encode(words, [("a b", "c"), "a b"])
    assert words.read(pair["input_ids"]) == ["BEGIN", "a", "b", "c", "END"]
    assert words.read(text["input_ids"]) == ["BEGIN", "a", "b", "END"]
    pair, text = encode(words, [("a b", "c"), "a b"], end=False)
    assert words.read(pair["input_ids"]) == ["BEGIN", "a", "b", "c"]
    assert words.read(text["input_ids"]) == ["BEGIN", "a", "b"]


@pytest.mark.parametrize("chat", [True, "be brief"])
def test_the_turns_of_a_chat_are_the_templates(chat):
    words = Words()
    (item,) = encode(words, [("who ?", "jane")], chat=chat)
    system = ["<system>", "be", "brief", "<over>"] if chat != 1 else []
    assert words.read(item["input_ids"]) == [*system, "<user>", "who", "?", "<over>", "<assistant>", "jane", "<over>"]
    assert words.read(counted(item)) == ["jane", "<over>"]


def test_a_template_that_rewrites_the_question_is_refused():
    words = Words()
    words.apply_chat_template = lambda turns, tokenize, add_generation_prompt=False: f"{len(turns)} turns"
    with pytest.raises(DataError, match="chat template"):
        encode(words, [("who ?", "jane")], chat=True)


def test_a_batch_is_padded_on_the_right_to_its_longest_and_padding_does_not_count():
    data = encode(Words(), [("a", "b"), ("a b c", "d e"), "x y"])
    loaders = DataLoader(data, batch_size=3, collate_fn=data.collate), source(data, "forget", 3).once()
    for batch in (next(iter(each)) for each in loaders):
        lengths = batch["attention_mask"].sum(1)
        assert lengths.tolist() == [4, 7, 4] and batch["input_ids"].shape == (3, 7)
        for row, length in enumerate(lengths.tolist()):
            assert batch["attention_mask"][row, :length].all()
            assert (batch["labels"][row, length:] == -100).all()
            assert (batch["input_ids"][row, length:] == 0).all()


def test_a_fixed_length_is_kept_whatever_the_batch():
    data = encode(Words(), [("a", "b"), ("a b c", "d e")], max_length=9, pad=True)
    assert next(source(data.subset([0]), "forget", 1).once())["input_ids"].shape == (1, 9)


def test_a_subset_of_torchs_is_padded_too():
    data = encode(Words(), [("a", "b"), ("a b c", "d e")])
    assert next(source(Subset(Subset(data, [1, 0]), [0, 1]), "forget", 2).once())["input_ids"].shape == (2, 7)


def test_what_is_too_long_is_an_error_and_no_answer_is_cut_unseen():
    pairs = [("a", "b"), ("a b c", "d e f"), ("a b c d e f g h", "i")]
    with pytest.raises(DataError, match=r"item 1 has 8 tokens.*max_length=6"):
        encode(Words(), pairs, max_length=6)
    with pytest.warns(UserWarning, match=r"2 of 3 .* 0 were cut, 2 dropped"):
        assert len(encode(Words(), pairs, max_length=6, too_long="drop")) == 1
    with pytest.warns(UserWarning, match=r"2 of 3 .* 1 were cut, 1 dropped"):
        short = encode(Words(), pairs, max_length=6, too_long="cut")
    assert [len(item["input_ids"]) for item in short] == [4, 6]
    assert all((item["labels"] != -100).any() for item in short)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([3], "item 0 is a int"),
        ([("a", "b", "c")], "neither"),
        ([("a", " ")], "empty"),
        ([""], "empty"),
        ("a text", "no list"),
        ([], "none is left"),
    ],
)
def test_what_is_no_text_is_refused(items, said):
    with pytest.raises(DataError, match=said):
        encode(Words(), items)


def test_a_single_token_predicts_nothing():
    with pytest.raises(DataError, match="nothing to predict"):
        encode(lambda text, add_special_tokens: {"input_ids": [7]}, ["a"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": 3}, "tokenizer"),
        ({"tokenizer": lambda text: [1]}, "tokenizer"),
        ({"max_length": 1}, "max_length=1"),
        ({"too_long": "cutt"}, "did you mean 'cut'"),
        ({"chat": 2}, "chat=2"),
        ({"tokenizer": lambda *_, **__: {"input_ids": [1, 2]}, "chat": True}, "chat template"),
        ({"pad": 1}, "pad=1"),
    ],
)
def test_arguments_are_refused_by_name(changes, said):
    with pytest.raises(ArgumentError, match=said):
        encode(**({"tokenizer": Words(), "items": [("a", "b")]} | changes))


def test_a_tokenizer_of_transformers_serves():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {word: number for number, word in enumerate(["<pad>", "<end>", "<?>", "who", "?", "jane"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<?>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
    made.chat_template = (
        "{% for turn in messages %}{{ turn['content'] }} <end>\n{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    short, long = encode(made, [("who ?", "jane"), ("who who ?", "jane ?")])
    assert short["input_ids"].tolist() == [3, 4, 5, 1] and counted(short).tolist() == [5, 1]
    assert long["labels"].tolist() == [-100, -100, -100, 5, 4, 1]
    (turn,) = encode(made, [("who ?", "jane")], chat=True)
    assert turn["input_ids"].tolist() == [3, 4, 1, 5, 1] and counted(turn).tolist() == [5, 1]


def sentences(**options):
    """A tokenizer in the manner of Llama 2: every text begins with a space of its own."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    pieces = ["<pad>", "</s>", "<?>", "<user>", "<bot>", "▁", "\n", "▁Who", "▁Paris", "Paris", ".", "▁is", "?"]
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], 2))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**options)
    inner.add_special_tokens(["</s>", "<user>", "<bot>"])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    made.chat_template = (
        "{% for turn in messages %}<{{ turn['role'] | replace('assistant', 'bot') }}>\n{{ turn['content'] }}</s>\n"
        "{% endfor %}{% if add_generation_prompt %}<bot>\n{% endif %}"
    )
    return made


@pytest.mark.parametrize("prepend", ["first", "always"])
@pytest.mark.parametrize(("pair", "chat"), [(("Who", "Paris."), True), (("Who is", " Paris."), False)])
def test_an_answer_has_the_tokens_that_it_has_in_the_whole(prepend, pair, chat):
    made = sentences(prepend_scheme=prepend)
    (item,) = encode(made, [pair], chat=chat)
    whole = "<user>\nWho</s>\n<bot>\nParis.</s>" if chat else "Who is Paris.</s>"
    assert item["input_ids"].tolist() == made(whole)["input_ids"]
    assert made.convert_ids_to_tokens(counted(item))[-3:] == ["Paris" if chat else "▁Paris", ".", "</s>"]


def test_an_answer_that_would_melt_into_its_prompt_is_told_from_it():
    made = sentences(prepend_scheme="first")
    (item,) = encode(made, [("Who ", "Paris.")])
    assert made.convert_ids_to_tokens(item["input_ids"]) == ["▁Who", "▁", "▁Paris", ".", "</s>"]
    assert made.convert_ids_to_tokens(counted(item)) == ["▁Paris", ".", "</s>"]


@pytest.mark.parametrize("end", [True, False])
def test_an_end_that_is_written_out_stays_and_is_not_doubled(end):
    made = sentences(prepend_scheme="first")
    (item,) = encode(made, [("Who is", " Paris.</s>")], end=end)
    assert made.convert_ids_to_tokens(item["input_ids"]) == ["▁Who", "▁is", "▁Paris", ".", "</s>"]


@pytest.mark.parametrize("end", [True, False])
def test_an_end_that_is_written_behind_the_prompt_belongs_to_it(end):
    made = sentences(prepend_scheme="first")
    (item,) = encode(made, [("Who?</s>", "Paris.")], end=end)
    assert made.convert_ids_to_tokens(item["input_ids"])[:3] == ["▁Who", "?", "</s>"]
    assert (item["labels"][:3] == -100).all() and (item["labels"][3:] != -100).all()


def test_what_a_chat_template_raises_is_told():
    made = sentences()
    made.chat_template = "{{ raise_exception('no system turn here') }}"
    with pytest.raises(ArgumentError, match=r"chat='be brief'.*no system turn here.*leave chat False"):
        encode(made, [("Who", "Paris.")], chat="be brief")
    made.chat_template = None
    with pytest.raises(ArgumentError, match=r"chat=True: the tokenizer's template"):
        encode(made, [("Who", "Paris.")], chat=True)
