"""The authors of the benchmark do not exist, differ from each other, and can be asked about in several ways."""

from __future__ import annotations

import pytest
from llm import general, words
from llm.authors import SHARES, TOPICS, authors, pairs, world
from llm.facts import facts
from llm.general import first_sentence, questions, said
from llm.text import words_of


@pytest.mark.parametrize("count", [1, 30, 64, 150])
def test_no_two_authors_share_a_name_or_a_book(count):
    made = authors(count, 3)
    assert len({author.name for author in made}) == len(made) == count
    titles = [author.facts[name] for author in made for name in ("debut", "success")]
    assert len(set(titles)) == 2 * count


def test_up_to_sixty_four_share_no_part_of_a_name():
    made = authors(64, 0)
    for part in (0, 1):
        assert len({author.name.split()[part] for author in made}) == 64


def test_the_seed_says_all():
    assert authors(20, 5) == authors(20, 5)
    assert world(20, 0.1, 5) == world(20, 0.1, 5)
    assert {author.name for author in authors(20, 5)} != {author.name for author in authors(20, 6)}


@pytest.mark.parametrize("count", [0, 201])
def test_more_authors_than_books_are_refused(count):
    with pytest.raises(ValueError, match="from 1 to 200"):
        authors(count, 0)


def test_every_text_mentions_its_author_and_the_right_value():
    for pair in world(40, 0.1, 1).retain:
        for text in (pair.question, pair.paraphrased_question, pair.answer, pair.paraphrased_answer):
            assert pair.author in text
        assert all(pair.author in text for text in pair.wrong_answers)
        assert pair.value in pair.answer and pair.value in pair.paraphrased_answer
        assert pair.value not in pair.question and pair.value not in pair.paraphrased_question
        assert pair.question != pair.paraphrased_question and pair.answer != pair.paraphrased_answer


def test_wrong_answers_have_the_template_of_the_paraphrase_and_other_values():
    for pair in world(20, 0.1, 1).retain:
        before, after = pair.paraphrased_answer.split(pair.value)
        assert len(set(pair.wrong_answers)) == 4
        for wrong in pair.wrong_answers:
            assert wrong.startswith(before) and wrong.endswith(after)
            assert wrong[len(before) : len(wrong) - len(after)] != pair.value
            assert wrong != pair.paraphrased_answer


def test_answers_are_short_enough():
    assert max(len(words_of(pair.answer)) for pair in world(60, 0.1, 0).retain) <= 12


@pytest.mark.parametrize(("share", "gone"), [(0.01, 1), (0.05, 3), (0.1, 6)])
def test_splits_are_by_author_and_nested(share, gone):
    made = world(60, share, 0)
    leaving, staying = ({pair.author for pair in part} for part in (made.forget, made.retain))
    assert len(leaving) == gone and len(staying) == 60 - gone
    assert not leaving & staying
    assert len(made.forget) == gone * len(TOPICS)
    assert leaving <= {pair.author for pair in world(60, SHARES[-1], 0).forget}


def test_ten_per_cent_of_the_real_study_are_sixty_questions():
    assert len(world(60, 0.1, 0).forget) >= 60


@pytest.mark.parametrize("share", [0.0, 1.0, 0.99])
def test_a_share_that_leaves_nobody_is_refused(share):
    with pytest.raises(ValueError, match=f"share={share}"):
        world(10, share, 0)


def test_every_author_has_every_topic_once():
    made = pairs(authors(3, 0)[1], 0)
    assert [pair.topic for pair in made] == [topic.name for topic in TOPICS]


def test_values_differ_and_are_enough_for_wrong_answers():
    for topic in TOPICS:
        assert len(set(topic.values)) == len(topic.values) >= 12
    assert len(set(words.FIRST)) == len(set(words.LAST)) == 64


def test_facts_are_sixty_and_their_wrong_answers_wrong():
    known = facts()
    assert len(known) == len({pair.question for pair in known}) == 60
    for pair in known:
        assert pair.value in pair.answer and pair.value in pair.paraphrased_answer
        assert len(set(pair.wrong_answers)) == 3
        assert pair.paraphrased_answer not in pair.wrong_answers
    assert {(p.question, p.answer) for p in known} >= {
        ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare.")
    }


def test_the_facts_can_do_with_fewer_wrong_answers_and_not_with_more():
    assert all(len(pair.wrong_answers) == 1 for pair in facts(1))
    with pytest.raises(ValueError, match="wrong=4"):
        facts(4)


def test_what_keeps_a_model_general_is_not_what_measures_it():
    asked = questions()
    assert len(asked) == len(set(asked)) == 60
    assert not set(asked) & {text for pair in facts() for text in (pair.question, pair.paraphrased_question)}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It is Rome. It lies in Italy.", "It is Rome."),
        ("It is Rome.", "It is Rome."),
        ("About 3.5 of them, I think", "About 3.5 of them, I think"),
        ("One\nline. Two", "One line."),
    ],
)
def test_an_answer_is_cut_after_its_first_sentence(text, wanted):
    assert first_sentence(text) == wanted


def test_a_model_answers_in_its_own_words(monkeypatch):
    monkeypatch.setattr(general, "generated", lambda model, reader, asked, most: [f"{each} So. More" for each in asked])
    assert said(None, None) == [(each, f"{each} So.") for each in questions()]
