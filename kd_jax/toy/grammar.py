"""A small language of questions, with the exact probability of every answer.

A stochastic grammar without recursion gives each instruction its distribution over answers. All
answers can be listed, so the entropy of a corpus is a sum, not an estimate.
"""

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ODDS = (0.7, 0.2, 0.1)
SLIPS = (0.8, 0.1, 0.1)  # odds of the right answer and of two wrong ones
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Paris", "Delhi", "Rome", "Dublin")
COUNTRIES = ("Portugal", "Norway", "Egypt", "Peru", "France", "India", "Italy", "Ireland")
SEASONS = ("spring", "summer", "autumn", "winter")
MEALS = ("breakfast", "lunch", "dinner")
TIMES = ("morning", "afternoon", "night")
ANIMALS = ("cat", "dog", "horse", "owl", "fox", "goat", "bear", "duck")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen",
)  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "new", "wet": "dry", "fast": "slow", "full": "empty",
    "hard": "soft", "rich": "poor", "cold": "hot", "small": "big", "new": "old", "dry": "wet",
    "slow": "fast", "empty": "full", "soft": "hard", "poor": "rich",
}  # fmt: skip


def _turns(name: str, subjects: Sequence[str], words: Sequence[str], odds: Sequence[float]):
    """Returns a rule for each subject; the likeliest word moves along the list by one each time."""
    return {
        f"{name} {subject}": {words[(i + j) % len(words)]: p for j, p in enumerate(odds)}
        for i, subject in enumerate(subjects)
    }


def _sums() -> dict[str, dict[str, float]]:
    """Returns a rule for each sum: the right number, and its two neighbours as slips."""
    return {
        f"sum {NUMBERS[a]} {NUMBERS[b]}": {
            NUMBERS[a + b + slip]: p for slip, p in zip((0, -1, 1), SLIPS, strict=True)
        }
        for a, b in itertools.product(range(1, 7), repeat=2)
    }


# Words that can fill a place of an answer, with their probabilities.
RULES: dict[str, dict[str, float]] = {
    **_turns("sky", CITIES, ("sunny", "cloudy", "rainy", "windy"), ODDS),
    **_turns("air", SEASONS, ("mild", "hot", "cool", "cold"), ODDS),
    **_turns("dish", CITIES, ("fish", "rice", "beans", "lamb", "soup"), ODDS),
    **_turns("drink", MEALS, ("tea", "water", "coffee"), ODDS),
    **_turns("act", ANIMALS, ("sleeping", "eating", "playing"), ODDS),
    **_turns("place", TIMES, ("in the barn", "on the hill", "by the pond"), ODDS),
    **_turns("capital", COUNTRIES, CITIES, SLIPS),
    **_turns("opposite", tuple(OPPOSITES), tuple(OPPOSITES.values()), SLIPS),
    **_sums(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of question; `{0}` is replaced by a first subject, `<sky {0}>` by a rule's words."""

    instructions: tuple[str, ...]
    subjects: tuple[Sequence[str], ...]
    answer: str
    exact: bool = False
    """One answer is right; it is also the likeliest."""


KINDS = (
    Kind(
        instructions=("Describe the weather in {0} in {1}.", "How is {0} in {1}?"),
        subjects=(CITIES, SEASONS),
        answer="It is <sky {0}> and <air {1}>.",
    ),
    Kind(
        instructions=("What do people in {0} have for {1}?", "In {0}, what is there for {1}?"),
        subjects=(CITIES, MEALS),
        answer="They have <dish {0}> and <drink {1}>.",
    ),
    Kind(
        instructions=("What is the {0} doing this {1}?", "Where is the {0} this {1}?"),
        subjects=(ANIMALS, TIMES),
        answer="It is <act {0}> <place {1}>.",
    ),
    Kind(
        instructions=("What is {0} plus {1}?", "Add {0} and {1}."),
        subjects=(NUMBERS[1:7], NUMBERS[1:7]),
        answer="It is <sum {0} {1}>.",
        exact=True,
    ),
    Kind(
        instructions=("What is the capital of {0}?", "Name the capital of {0}."),
        subjects=(COUNTRIES,),
        answer="It is <capital {0}>.",
        exact=True,
    ),
    Kind(
        instructions=("What is the opposite of {0}?", "Name the opposite of {0}."),
        subjects=(tuple(OPPOSITES),),
        answer="It is <opposite {0}>.",
        exact=True,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    instruction: str
    probability: float
    """Probability of the question. Kinds are equally likely, and so are questions of a kind."""
    answers: dict[str, float]
    """Probability of every answer."""
    exact: bool

    @property
    def likeliest(self) -> str:
        return max(self.answers, key=lambda answer: self.answers[answer])

    @property
    def entropy(self) -> float:
        """Returns the entropy of the answer, -sum p log p, in nats."""
        return -sum(p * math.log(p) for p in self.answers.values())


def expand(text: str) -> dict[str, float]:
    """Returns the probability of every text that the `<rule>` places can produce.

    Derivations of the same text are added up.
    """
    found = {"": 1.0}
    for part in re.split(r"(<[^>]*>)", text):
        choices = RULES[part[1:-1]] if part.startswith("<") else {part: 1.0}
        longer: dict[str, float] = {}
        for (before, p), (word, q) in itertools.product(found.items(), choices.items()):
            longer[before + word] = longer.get(before + word, 0.0) + p * q
        found = longer
    return found


def make_questions() -> list[Question]:
    """Returns every question of the language, with the probabilities of its answers."""
    questions = []
    for kind in KINDS:
        asked = list(itertools.product(kind.instructions, itertools.product(*kind.subjects)))
        questions += [
            Question(
                instruction=instruction.format(*words),
                probability=1 / (len(KINDS) * len(asked)),
                answers=expand(kind.answer.format(*words)),
                exact=kind.exact,
            )
            for instruction, words in asked
        ]
    return questions


def draw(count: int, seed: str) -> list[tuple[Question, str]]:
    """Returns questions with one sampled answer each."""
    rng = random.Random(seed)
    questions = make_questions()
    asked = rng.choices(questions, [question.probability for question in questions], k=count)
    return [(q, rng.choices(list(q.answers), list(q.answers.values()))[0]) for q in asked]


def to_lines(drawn: Sequence[tuple[Question, str]]) -> str:
    """Returns Alpaca records as JSON lines."""
    records = ({"instruction": q.instruction, "input": "", "output": a} for q, a in drawn)
    return "".join(json.dumps(record) + "\n" for record in records)


def expected_floor(num_tokens: Callable[[str], int]) -> float:
    """Returns the lowest expected cross-entropy of any model, in nats per target token.

    It is E[-log P(answer | instruction)] / E[tokens], the entropy: text and tokens determine each
    other. `num_tokens` counts an answer's tokens and its end of turn, which is certain.
    """
    questions = make_questions()
    nats = sum(q.probability * q.entropy for q in questions)
    tokens = sum(q.probability * p * num_tokens(a) for q in questions for a, p in q.answers.items())
    return nats / tokens


def realised_floor(
    drawn: Sequence[tuple[Question, str]], num_tokens: Callable[[str], int]
) -> float:
    """Returns the true model's cross-entropy on the drawn answers, in nats per target token."""
    nats = -sum(math.log(question.answers[answer]) for question, answer in drawn)
    return nats / sum(num_tokens(answer) for _, answer in drawn)
