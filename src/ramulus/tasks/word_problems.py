"""One-step word problems for a chat model, with worked examples as earlier turns; a small instruct model solves a sixth of them at first."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import permutations, product

from ramulus.tasks.problem import Problem
from ramulus.tasks.sums import check_amounts, turns

TRAIN = 1200
HELD = 12  # of the 64 pairs of numbers, of which no story is in train
PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma")
THINGS = ("apples", "books", "coins", "marbles", "stickers")
WORKED = (
    ("Tom has 3 apples and buys 5 more. How many apples does Tom have?", "Tom starts with 3 apples. He buys 5 more: 3 + 5 = 8.", 8),
    ("A pen costs 4 dollars. Lisa buys 6 pens. How many dollars does she spend?", "Each pen costs 4 dollars. She buys 6: 6 * 4 = 24.", 24),
    ("Sam has 9 books and loses 2 of them. How many books does Sam have left?", "Sam starts with 9 books and loses 2: 9 - 2 = 7.", 7),
)


@dataclass(frozen=True)
class WordProblems:
    """Problems such as `Anna has 4 coins. Ben gives Anna 3 more. How many coins does Anna have now?`: gains, losses, boxes and totals.

    The same for the same seed, every one different; the pairs of numbers in test are never in train. `examples` of them come before each as
    turns of the chat, worked out and answered in a box; demonstrations are written as the examples are.

    Example:
        >>> from ramulus import WordProblems
        >>> problem = WordProblems(1)()[0]
        >>> len(problem.messages), problem.text.endswith("?")
        (5, True)
    """

    count: int = TRAIN
    split: str = "train"
    examples: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_amounts(self, TRAIN, len(WORKED), "word problems")

    def __call__(self) -> list[Problem]:
        numbers = list(product(range(2, 10), repeat=2))
        random.Random("word problems").shuffle(numbers)
        numbers = numbers[:HELD] if self.split == "test" else numbers[HELD:]
        drawings = product(permutations(PEOPLE, 2), THINGS, numbers)
        stories = list({story[0]: story for drawing in drawings for story in _stories(*drawing)}.values())
        drawn = random.Random(f"{self.seed}/{self.split}").sample(stories, len(stories))[: self.count]
        shown = [turn for question, work, answer in WORKED[: self.examples] for turn in turns(question, _solution(work, answer))]
        return [self._problem(story, shown) for story in drawn]

    def _problem(self, story: tuple[str, str, int], shown: list[dict[str, str]]) -> Problem:
        question, work, answer = story
        return Problem(question, question, str(answer), (_solution(work, answer),), messages=(*shown, *turns(question)))


def _stories(names: tuple[str, ...], things: str, numbers: tuple[int, ...]) -> list[tuple[str, str, int]]:
    """Question, work and answer of each of the four kinds."""
    (who, other), (a, b) = names, numbers
    return [
        (
            f"{who} has {a} {things}. {other} gives {who} {b} more. How many {things} does {who} have now?",
            f"{who} starts with {a} {things}. {other} gives {b} more: {a} + {b} = {a + b}.", a + b,
        ),
        (
            f"{who} has {a + b} {things} and loses {b} of them. How many {things} does {who} have left?",
            f"{who} starts with {a + b} {things} and loses {b}: {a + b} - {b} = {a}.", a,
        ),
        (
            f"{who} buys {a} boxes with {b} {things} in each box. How many {things} does {who} have?",
            f"{a} boxes with {b} {things} each: {a} * {b} = {a * b}.", a * b,
        ),
        (
            f"{who} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
            f"{who} has {a} and {other} has {b}: {a} + {b} = {a + b}.", a + b,
        ),
    ]  # fmt: skip


def _solution(work: str, answer: int) -> str:
    return f"{work} The answer is \\boxed{{{answer}}}."
