"""What a teacher says of known texts is kept instead of the teacher, where that takes less room, and is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import forged_tensors
from helpers import Interrupted, blobs, interrupt, mlp, same, state
from lm import WORDS, Gpt, Words, llama, text
from torch.utils.data import DataLoader, Dataset

import fastlur
from fastlur import targets
from fastlur.answers import Answers, kept
from fastlur.data import Feed, source
from fastlur.errors import CheckpointError, DataError
from fastlur.llm import encode
from fastlur.targets import Imitation, Novice
from fastlur.task import viewed_as

FORGET, RETAIN = text(8, 1), text(16, 2)


@pytest.fixture(autouse=True)
def any_novice(monkeypatch):
    """Nothing here is about what a novice has learned."""
    monkeypatch.setattr(targets, "LEARNED", 9.0)


def feed(data, size=3):
    return Feed({"forget": source(data, "forget", size)}, 0, torch.device("cpu"))


def run(model, forget=FORGET, **options):
    options = {"steps": 4, "batch_size": 4, "progress": False, "lr": 0.05} | options
    return fastlur.unlearn(model, forget, RETAIN, **options)


def part(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def shifted(batch, by, left):
    """The same items with more padding on a side."""
    fill = {"labels": -100}
    sides = (by, 0) if left else (0, by)
    return {n: torch.nn.functional.pad(v, sides, value=fill.get(n, 0)) for n, v in batch.items()}


@pytest.mark.parametrize("without_truth", [False, True])
def test_imitating_them_is_imitating_the_teacher(without_truth):
    model, teacher = llama(seed=1), llama(seed=2).eval()
    answers = kept(feed(FORGET), teacher, teacher)
    assert len(answers.logits) == int((FORGET["labels"][:, 1:] != -100).sum())
    for batch in (FORGET, part(FORGET, [5, 2, 2, 7]), shifted(part(FORGET, [0, 3]), 4, False)):
        found = [
            torch.autograd.grad(each(model, batch), list(model.parameters()))
            for each in (Imitation(of, 1.5, without_truth, 2.0) for of in (teacher, answers))
        ]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_padding_on_the_left_finds_the_same_answers():
    teacher = llama().eval()
    answers = kept(feed(FORGET), teacher, teacher)
    right, left = part(FORGET, [1, 4]), shifted(part(FORGET, [1, 4]), 3, True)
    rows = [answers.of(batch)[0].view(2, -1, WORDS) for batch in (right, left)]
    counts = right["labels"][:, 1:] != -100
    assert torch.equal(rows[0][:, :-1][counts], rows[1][:, 3:-1][counts])


def test_one_that_was_not_seen_is_an_error_and_not_anothers_answer():
    teacher = llama().eval()
    answers = kept(feed(FORGET), teacher, teacher)
    batch = part(FORGET, [0, 1]) | {"input_ids": FORGET["input_ids"][:2].roll(1, 1)}
    with pytest.raises(DataError, match=r"items \[0, 1\] of a batch were not seen"):
        Imitation(answers)(llama(), batch)


ITEMS = [part(FORGET, row) for row in range(8)]


class Changing(Dataset):
    """Other words each time they are read."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        ids = torch.randint(1, WORDS, (7,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Wide(Gpt):
    """Few parameters and many words: what it says takes more room than itself."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids).repeat(1, 1, 2000)


@pytest.mark.parametrize(
    ("network", "data"),
    [
        (mlp(), blobs(12)),
        (llama(), Changing()),
        (Wide(), FORGET),
        (llama(), DataLoader(ITEMS, batch_size=5, drop_last=True)),
        (llama(), [{"inputs_embeds": torch.rand(2, 5, 24), "labels": torch.randint(0, WORDS, (2, 5))}]),
        (llama(), FORGET | {"pixel_values": torch.rand(8, 3)}),
        (llama(), FORGET | {"labels": torch.where(FORGET["attention_mask"] == 0, 0, FORGET["labels"])}),
    ],
    ids=["classes", "changing", "more room", "some left out", "no tokens", "more than text", "padding that counts"],
)
def test_the_teacher_is_kept_where_it_serves_better(network, data):
    with viewed_as("classification" if isinstance(data, tuple) else "causal_lm"):
        assert kept(feed(data, 2), network.eval(), network) is None


def test_of_the_same_items_in_a_loader_they_are_kept():
    """What is refused above is refused for what it says there."""
    for data in (DataLoader(ITEMS, 5, shuffle=True), FORGET, FORGET | {"position_ids": torch.arange(9).expand(8, 9)}):
        teacher = llama().eval()
        answers = kept(feed(data, 2), teacher, teacher)
        wanted = teacher(FORGET["input_ids"], attention_mask=FORGET["attention_mask"]).logits
        counts = FORGET["labels"][:, 1:] != -100
        torch.testing.assert_close(answers.of(FORGET)[0].view_as(wanted)[:, :-1][counts], wanted[:, :-1][counts])


def test_one_of_other_labels_is_another_item():
    teacher = llama().eval()
    answers = kept(feed(FORGET), teacher, teacher)
    labels = FORGET["labels"].clone()
    labels[0, 3] = -100
    with pytest.raises(DataError, match=r"items \[0\] of a batch"):
        answers.of(FORGET | {"labels": labels})


def test_one_whose_padding_counts_now_is_another_item():
    """Its tokens are the same and its rows are not, which would be those of the next."""
    teacher = llama().eval()
    answers = kept(feed(FORGET), teacher, teacher)
    short = int(FORGET["attention_mask"].sum(1).argmin())
    batch = part(FORGET, [short])
    with pytest.raises(DataError, match=r"items \[0\] of a batch"):
        answers.of(batch | {"labels": torch.where(batch["attention_mask"] == 0, 0, batch["labels"])})


def test_a_label_at_the_first_place_has_no_answer():
    data = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "labels": torch.tensor([[3, 4, 5], [6, -100, -100]])}
    teacher = llama().eval()
    answers = kept(feed(data), teacher, teacher)
    assert sorted(answers.sizes.tolist()) == [0, 2] and len(answers.logits) == 2
    assert bool(answers.of(part(data, [1]))[1])


def test_a_run_keeps_no_novice():
    model, seen, steps = llama(), [], []
    start = copy.deepcopy(model)
    start.register_forward_hook(lambda *_: seen.append(len(steps)))  # its copies have it too
    result = run(model, forget_loss=Novice(epochs=1, lr=1e-2, start=start), callbacks=[lambda e: steps.append(e)])
    assert result.settings["forget_target"].startswith("Imitation(sharpness=2.0")
    assert len(steps) == 4 and set(seen) == {0}


def test_encoded_pairs_are_found_again(monkeypatch):
    asked, of = [], Answers.of
    monkeypatch.setattr(Answers, "of", lambda self, batch: asked.append(len(batch["labels"])) or of(self, batch))
    words = Words()
    forget = encode(words, [("who wrote it ?", "jane austen"), ("when ?", "in 1815"), ("where ?", "here")])
    run(llama(), forget, forget_loss=Novice(epochs=1, lr=1e-2, start=llama(seed=4)), batch_size=2, steps=4)
    assert asked == [2] * 4


class TestAResumedRun:
    def interrupted(self, folder):
        model = llama(seed=1)
        options = {"forget_loss": Novice(epochs=1, lr=1e-2, start=llama(seed=2), temperature=2.0)}
        options |= {"checkpoint": folder, "checkpoint_every": 1}
        with pytest.raises(Interrupted):
            run(copy.deepcopy(model), callbacks=[interrupt], **options)
        return model, options

    def test_has_the_same_answers_and_asks_nobody(self, tmp_path, monkeypatch):
        model, options = self.interrupted(tmp_path)
        twin = copy.deepcopy(model)
        run(twin, forget_loss=options["forget_loss"])
        monkeypatch.setattr(Novice, "prepare", lambda *_: 1 / 0)
        run(model, **options)
        assert same(state(model), state(twin))

    @pytest.mark.parametrize(
        ("name", "spoilt"),
        [
            ("keys", lambda t: t.flip(0)),
            ("keys", lambda t: t[:-1]),
            ("begins", lambda t: t + 1000),
            ("sizes", lambda t: t + 1),
            ("begins", lambda t: t.double()),
            ("logits", lambda t: t[0]),
            ("logits", lambda t: t.long()),
            ("logits", None),
        ],
    )
    def test_refuses_answers_that_cannot_be(self, name, spoilt, tmp_path):
        model, options = self.interrupted(tmp_path)
        before = state(model)

        def change(tensors):
            value = tensors.pop(f"target/{name}")
            if spoilt is not None:
                tensors[f"target/{name}"] = spoilt(value).contiguous()

        forged_tensors(tmp_path, change)
        with pytest.raises(CheckpointError, match="its target"):
            run(model, **options)
        assert same(before, state(model))
