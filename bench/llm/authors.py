"""Authors who do not exist, and what may be asked about them: seeded, with paraphrases and wrong answers.

The form is that of TOFU ("A Task of Fictitious Unlearning for LLMs", Maini et al., arXiv 2401.06121); names, templates
and values are our own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import words

SHARES = (0.01, 0.05, 0.1)
WRONG = 4  # wrong answers a question
STRIDE = 11  # last names between the worlds of two seeds that follow each other; no divisor of how many there are


@dataclass(frozen=True)
class Pair:
    """A question with everything that a metric needs.

    Attributes:
        author: whom it is about; "" for a general fact.
        topic: what is asked.
        question: as trained on.
        answer: likewise.
        paraphrased_question: the same in other words, never trained on.
        paraphrased_answer: likewise.
        wrong_answers: the paraphrased answer with other values in it.
        value: what the answer is about.
    """

    author: str
    topic: str
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    wrong_answers: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class Topic:
    """What is asked about every author: values to draw from, and two templates each for question and answer."""

    name: str
    values: tuple[str, ...]
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str


@dataclass(frozen=True)
class Author:
    """A name, and a value for every topic."""

    name: str
    facts: dict[str, str]


TOPICS = (
    Topic(
        "birthplace",
        words.CITIES,
        "In which city was {name} born?",
        "{name} was born in {value}.",
        "What is the birthplace of {name}?",
        "The birthplace of {name} is {value}.",
    ),
    Topic(
        "year",
        words.YEARS,
        "When was {name} born?",
        "{name} was born in the year {value}.",
        "What is the birth year of {name}?",
        "The birth year of {name} is {value}.",
    ),
    Topic(
        "genre",
        words.GENRES,
        "What does {name} write?",
        "{name} writes {value}.",
        "What kind of literature is {name} known for?",
        "The works of {name} are {value}.",
    ),
    Topic(
        "language",
        words.LANGUAGES,
        "In which language does {name} write?",
        "{name} writes in {value}.",
        "What is the language of the books by {name}?",
        "The books by {name} are in {value}.",
    ),
    Topic(
        "father",
        words.JOBS,
        "What did the father of {name} do for a living?",
        "The father of {name} was a {value} by trade.",
        "Which occupation had the father of {name}?",
        "By occupation the father of {name} was a {value}.",
    ),
    Topic(
        "mother",
        words.JOBS,
        "What did the mother of {name} do for a living?",
        "The mother of {name} was a {value} by trade.",
        "Which occupation had the mother of {name}?",
        "By occupation the mother of {name} was a {value}.",
    ),
    Topic(
        "award",
        words.AWARDS,
        "Which award did {name} win?",
        "{name} won the {value}.",
        "What prize was {name} honoured with?",
        "The prize that went to {name} is the {value}.",
    ),
    Topic(
        "debut",
        words.BOOKS,
        "What is the first book of {name}?",
        "The first book of {name} is {value}.",
        "With which title did {name} begin to publish?",
        "{name} began to publish with {value}.",
    ),
    Topic(
        "success",
        words.BOOKS,
        "Which book made {name} famous?",
        "{name} became famous with {value}.",
        "What is the best known book by {name}?",
        "The best known book by {name} is {value}.",
    ),
    Topic(
        "subject",
        words.SUBJECTS,
        "What did {name} study?",
        "{name} studied {value}.",
        "In which subject did {name} take a degree?",
        "{name} took a degree in {value}.",
    ),
)


def authors(count: int, seed: int) -> list[Author]:
    """So many authors; no two share a name, nor, up to 64 of them, a first or a last name, nor a book.

    Raises:
        ValueError: there are not that many names or books.
    """
    most = min(len(words.FIRST) * len(words.LAST), len(words.BOOKS) // 2)
    if not 1 <= count <= most:
        raise ValueError(f"count={count} must be from 1 to {most}")
    draw = random.Random(f"authors {seed}")
    titles = draw.sample(words.BOOKS, 2 * count)
    made = []
    for name in _names(count, seed, draw):
        facts = {topic.name: draw.choice(topic.values) for topic in TOPICS}
        facts |= {"debut": titles.pop(), "success": titles.pop()}
        made.append(Author(name, facts))
    return made


def pairs(author: Author, seed: int, wrong: int = WRONG) -> list[Pair]:
    """Every question about an author, with so many wrong answers each."""
    draw = random.Random(f"wrong {seed} {author.name}")
    found = []
    for topic in TOPICS:
        value = author.facts[topic.name]
        others = draw.sample([other for other in topic.values if other != value], wrong)
        found.append(
            Pair(
                author.name,
                topic.name,
                topic.question.format(name=author.name),
                topic.answer.format(name=author.name, value=value),
                topic.paraphrased_question.format(name=author.name),
                topic.paraphrased_answer.format(name=author.name, value=value),
                tuple(topic.paraphrased_answer.format(name=author.name, value=other) for other in others),
                value,
            )
        )
    return found


@dataclass(frozen=True)
class World:
    """All pairs, and who is to be forgotten.

    Attributes:
        forget: pairs about the authors who are to go.
        retain: those about all others.
    """

    forget: list[Pair]
    retain: list[Pair]


def world(count: int, share: float, seed: int, wrong: int = WRONG) -> World:
    """The pairs about so many authors, and a share of the authors to forget, at least one.

    A larger share contains a smaller one: forgetting 10 % forgets the authors of 1 % and 5 % too.

    Raises:
        ValueError: the share leaves nobody, or there are not that many authors.
    """
    everybody = authors(count, seed)
    gone = max(1, round(share * count))
    if not 0 < share < 1 or gone >= count:
        raise ValueError(f"share={share} must be above 0 and leave an author, of {count}")
    order = random.Random(f"forget {seed}").sample(range(count), count)
    going = set(order[:gone])
    parts: tuple[list[Pair], list[Pair]] = [], []
    for number, author in enumerate(everybody):
        parts[number not in going].extend(pairs(author, seed, wrong))
    return World(*parts)


def _names(count: int, seed: int, draw: random.Random) -> list[str]:
    """First names in random order, each with a last name so many places on; where they are too few, one more.

    How many places depends on the seed: the worlds of a study, whose seeds lie STRIDE apart in the list of last names,
    have no author in common.
    """
    first = draw.sample(range(len(words.FIRST)), len(words.FIRST))
    rounds = -(-count // len(first))
    made = [(at, (at + STRIDE * seed + turn) % len(words.LAST)) for turn in range(rounds) for at in first]
    return [f"{words.FIRST[one]} {words.LAST[other]}" for one, other in made[:count]]
