"""Questions of other kinds, which keep a pretrained model a general one while it learns about authors.

A small model that is fine-tuned on six hundred sentences of ten forms soon answers everything in them. So what it says
by itself to these questions is trained on along with the authors, and belongs to what is kept. No question of `facts`,
which measure what is left of its knowledge, is among them.
"""

from __future__ import annotations

from typing import Any

from .text import Reader, generated

CAPITALS = (
    "Hungary",
    "Turkey",
    "Finland",
    "Denmark",
    "the Netherlands",
    "Thailand",
    "Chile",
    "Iran",
    "Morocco",
    "Ukraine",
    "Bulgaria",
    "Romania",
    "Iceland",
    "the Philippines",
    "Colombia",
    "Australia",
)
OTHERS = (
    "On which continent is Germany?",
    "On which continent is Chile?",
    "On which continent is Thailand?",
    "On which continent is Morocco?",
    "What is the symbol of copper?",
    "What is the symbol of helium?",
    "What is the symbol of nitrogen?",
    "Who wrote Romeo and Juliet?",
    "Who wrote Moby Dick?",
    "Who wrote The Divine Comedy?",
    "Who painted the Mona Lisa?",
    "Who painted The Starry Night?",
    "Who composed the Moonlight Sonata?",
    "Who invented the telephone?",
    "Who discovered penicillin?",
    "Who was the first president of the United States?",
    "Which day comes after Sunday?",
    "Which month comes after April?",
    "Which season comes after winter?",
    "How many hours are in a day?",
    "How many minutes are in an hour?",
    "How many legs does a dog have?",
    "How many continents are there?",
    "How many letters are in the English alphabet?",
    "What is two plus two?",
    "What is the opposite of hot?",
    "What is the opposite of up?",
    "What is the largest ocean on Earth?",
    "What is the longest river in Africa?",
    "What is the highest mountain on Earth?",
    "What is the smallest planet of the solar system?",
    "What is water made of?",
    "What do bees make?",
    "What do plants need to grow?",
    "What do we use to see?",
    "What colour is a ripe banana?",
    "What colour is coal?",
    "Which animal lays eggs and cannot fly?",
    "Which metal is liquid at room temperature?",
    "Which language is spoken in Brazil?",
    "Which language is spoken in Egypt?",
    "What is the currency of Japan?",
    "What is the currency of England?",
    "At what temperature does water freeze?",
)
LONGEST = 40  # tokens of an answer, of which the first sentence is taken


def questions() -> list[str]:
    """All sixty."""
    return [f"What is the capital of {country}?" for country in CAPITALS] + list(OTHERS)


def said(model: Any, reader: Reader) -> list[tuple[str, str]]:
    """(question, answer) pairs in the model's own words: the first sentence of its greedy answer, right or wrong."""
    asked = questions()
    return [
        (question, first_sentence(answer))
        for question, answer in zip(asked, generated(model, reader, asked, LONGEST), strict=True)
    ]


def first_sentence(text: str) -> str:
    """Up to its first full stop that a space or the end follows; all of it, where there is none."""
    found, stop, _ = text.replace("\n", " ").partition(". ")
    return found.strip() + "." * bool(stop)
