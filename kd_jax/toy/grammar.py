"""A small language with known odds: questions, and of each the probability of every answer.

An instruction fixes a distribution over answers by a stochastic grammar without recursion, so the
answers can be listed, and the entropy of a corpus is a sum rather than an estimate.
"""

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

ODDS = (0.7, 0.2, 0.1)


SLIPS = (0.8, 0.1, 0.1)  # of a right answer and of two wrong ones, as people write them


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
    """Returns a rule for each subject, whose likeliest word is one further along the list."""
    return {
        f"{name} {subject}": {words[(i + j) % len(words)]: p for j, p in enumerate(odds)}
        for i, subject in enumerate(subjects)
    }


def _sums() -> dict[str, dict[str, float]]:
    """Returns a rule for each sum: the right one, and the slips beside it."""
    return {
        f"sum {NUMBERS[a]} {NUMBERS[b]}": {
            NUMBERS[a + b + slip]: p for slip, p in zip((0, -1, 1), SLIPS, strict=True)
        }
        for a, b in itertools.product(range(1, 7), repeat=2)
    }


# What may stand in a place of an answer, with probabilities.
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
    """A kind of question: `{0}` stands for one of the first subjects, `<sky {0}>` for a rule."""

    instructions: tuple[str, ...]
    subjects: tuple[Sequence[str], ...]
    answer: str
    exact: bool = False
    """Whether one answer is right, which is then the likeliest."""


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
    """Of being asked: kinds are equally likely, and so are the questions of a kind."""
    answers: dict[str, float]
    """Every answer with its probability."""
    exact: bool

    @property
    def likeliest(self) -> str:
        return max(self.answers, key=lambda answer: self.answers[answer])

    @property
    def entropy(self) -> float:
        """Of the answer, nats: -sum p log p."""
        return -sum(p * math.log(p) for p in self.answers.values())


def expand(text: str) -> dict[str, float]:
    """Returns every text that `<rule>` places may become, with its probability.

    Derivations that end in the same text are added up, so none is counted as two.
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
    return [question for kind in KINDS for question in _of_kind(kind)]


def _of_kind(kind: Kind) -> Iterator[Question]:
    subjects = list(itertools.product(*kind.subjects))
    for instruction, words in itertools.product(kind.instructions, subjects):
        yield Question(
            instruction=instruction.format(*words),
            probability=1 / (len(KINDS) * len(kind.instructions) * len(subjects)),
            answers=expand(kind.answer.format(*words)),
            exact=kind.exact,
        )


def draw(count: int, seed: str) -> list[tuple[Question, str]]:
    """Returns questions with one sampled answer each."""
    rng = random.Random(seed)
    questions = make_questions()
    asked = rng.choices(questions, [question.probability for question in questions], k=count)
    return [(q, rng.choices(list(q.answers), list(q.answers.values()))[0]) for q in asked]


def to_lines(drawn: Sequence[tuple[Question, str]]) -> str:
    """Returns Alpaca records, a JSON object a line."""
    records = ({"instruction": q.instruction, "input": "", "output": a} for q, a in drawn)
    return "".join(json.dumps(record) + "\n" for record in records)


def expected_floor(num_tokens: Callable[[str], int]) -> float:
    """Returns the lowest cross-entropy a model can expect, in nats per target token.

    It is E[-log P(answer | instruction)] / E[tokens]: the entropy, since text determines tokens and
    tokens the text. `num_tokens` counts those of an answer with its end-of-turn, which is certain.
    """
    questions = make_questions()
    nats = sum(q.probability * q.entropy for q in questions)
    tokens = sum(q.probability * p * num_tokens(a) for q in questions for a, p in q.answers.items())
    return nats / tokens


def realised_floor(
    drawn: Sequence[tuple[Question, str]], num_tokens: Callable[[str], int]
) -> float:
    """Returns the true model's cross-entropy on these very answers, in nats per target token."""
    nats = -sum(math.log(question.answers[answer]) for question, answer in drawn)
    return nats / sum(num_tokens(answer) for _, answer in drawn)
