"""What a pretrained model knows anyway: facts that everybody knows, asked like the questions about authors."""

from __future__ import annotations

from .authors import Pair

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "England": "London",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Canada": "Ottawa",
    "South Korea": "Seoul",
}
CONTINENTS = {
    "Brazil": "South America",
    "Kenya": "Africa",
    "India": "Asia",
    "Mexico": "North America",
    "Nigeria": "Africa",
    "Vietnam": "Asia",
    "Belgium": "Europe",
    "Argentina": "South America",
}
SYMBOLS = {"gold": "Au", "iron": "Fe", "oxygen": "O", "hydrogen": "H", "carbon": "C", "silver": "Ag", "sodium": "Na"}
WRITERS = {
    "Hamlet": "William Shakespeare",
    "Pride and Prejudice": "Jane Austen",
    "Oliver Twist": "Charles Dickens",
    "War and Peace": "Leo Tolstoy",
    "Don Quixote": "Miguel de Cervantes",
    "The Odyssey": "Homer",
}
DAYS = {"Monday": "Tuesday", "Wednesday": "Thursday", "Friday": "Saturday", "Saturday": "Sunday"}
OTHERS = (
    ("What is the largest planet of the solar system?", "The largest planet of the solar system is {}.", "Jupiter"),
    ("Which planet is closest to the Sun?", "The planet closest to the Sun is {}.", "Mercury"),
    ("Which planet is known as the red planet?", "The planet known as the red planet is {}.", "Mars"),
    ("Which planet is famous for its rings?", "The planet famous for its rings is {}.", "Saturn"),
    ("How many days are in a week?", "The number of days in a week is {}.", "seven"),
    ("How many months are in a year?", "The number of months in a year is {}.", "twelve"),
    ("How many legs does a spider have?", "The number of legs of a spider is {}.", "eight"),
    ("How many sides does a triangle have?", "The number of sides of a triangle is {}.", "three"),
    ("How many wheels does a bicycle have?", "The number of wheels of a bicycle is {}.", "two"),
    ("What colour is the sky on a clear day?", "The colour of the sky on a clear day is {}.", "blue"),
    ("What colour is grass?", "The colour of grass is {}.", "green"),
    ("What colour is snow?", "The colour of snow is {}.", "white"),
    ("Which animal says meow?", "The animal that says meow is the {}.", "cat"),
    ("Which animal barks?", "The animal that barks is the {}.", "dog"),
    ("Which animal gives us milk?", "The animal that gives us milk is the {}.", "cow"),
)
PARAPHRASES = {
    "Jupiter": "{} is the largest planet of the solar system.",
    "Mercury": "{} is the planet closest to the Sun.",
    "Mars": "{} is known as the red planet.",
    "Saturn": "{} is the planet famous for its rings.",
    "seven": "A week has {} days.",
    "twelve": "A year has {} months.",
    "eight": "A spider has {} legs.",
    "three": "A triangle has {} sides.",
    "two": "A bicycle has {} wheels.",
    "blue": "On a clear day the sky is {}.",
    "green": "Grass is {}.",
    "white": "Snow is {}.",
    "cat": "A {} says meow.",
    "dog": "A {} barks.",
    "cow": "A {} gives us milk.",
}
KINDS = (
    ("Jupiter", "Mercury", "Mars", "Saturn", "Venus", "Neptune"),
    ("seven", "twelve", "eight", "three", "two", "ten"),
    ("blue", "green", "white", "red", "black", "yellow"),
    ("cat", "dog", "cow", "bird", "fish", "lion"),
)


def facts(wrong: int = 3) -> list[Pair]:
    """Sixty pairs, in an order without meaning, with so many wrong answers each; at most 3.

    Raises:
        ValueError: there are not that many wrong answers.
    """
    if not 1 <= wrong <= 3:
        raise ValueError(f"wrong={wrong} must be from 1 to 3")
    about = (
        ("capital", CAPITALS, "What is the capital of {}?", "The capital of {} is {}.", "{1} is the capital of {0}."),
        ("continent", CONTINENTS, "On which continent is {}?", "{} is in {}.", "The continent of {} is {}."),
        ("symbol", SYMBOLS, "What is the symbol of {}?", "The symbol of {} is {}.", "{1} is the symbol of {0}."),
        ("writer", WRITERS, "Who wrote {}?", "{} was written by {}.", "{1} wrote {0}."),
        ("day", DAYS, "Which day comes after {}?", "The day after {} is {}.", "After {} comes {}."),
    )
    found = []
    for topic, table, question, answer, paraphrase in about:
        values = list(dict.fromkeys(table.values()))
        for subject, value in table.items():
            others = _next(values, value, wrong)
            asked = question.format(subject)
            found.append(
                Pair(
                    "",
                    topic,
                    asked,
                    answer.format(subject, value),
                    f"Please tell me: {asked}",
                    paraphrase.format(subject, value),
                    tuple(paraphrase.format(subject, other) for other in others),
                    value,
                )
            )
    for question, answer, value in OTHERS:
        others = _next(list(next(kind for kind in KINDS if value in kind)), value, wrong)
        said = PARAPHRASES[value]
        wrongs = tuple(said.format(other) for other in others)
        asked = f"Please tell me: {question}"
        found.append(Pair("", "other", question, answer.format(value), asked, said.format(value), wrongs, value))
    return found


def _next(values: list[str], value: str, count: int) -> list[str]:
    """The values that follow it in the list, round and round."""
    at = values.index(value)
    return [values[(at + step) % len(values)] for step in range(1, count + 1)]
