"""Sums of three digits for a chat model, with worked examples as earlier turns; a small instruct model solves some of them, as RL needs it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

from ramulus.tasks.problem import Problem

TEST = 60  # of the 729 sums; fixed, so that train and test stay apart whatever is asked for
EXAMPLES = ((3, 4, 2), (8, 5, 1), (6, 2, 7), (9, 9, 4))


@dataclass(frozen=True)
class Sums:
    """Problems such as `What is 3 + 4 + 2?`, every one different, the same for the same seed, test ones never in train.

    `examples` of them come before each as turns of the chat, worked out one addition at a time and answered in a box, so that a model that has
    not been told to box its answer sees how. Demonstrations are written as the examples are.

    Example:
        >>> from ramulus import Sums
        >>> problem = Sums(1)()[0]
        >>> len(problem.messages), problem.text.startswith("What is ")
        (5, True)
    """

    count: int = 669
    split: str = "train"
    examples: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_amounts(self, 9**3 - TEST, len(EXAMPLES), "sums of three digits")

    def __call__(self) -> list[Problem]:
        sums = [terms for terms in product(range(1, 10), repeat=3) if terms not in EXAMPLES]
        random.Random("sums").shuffle(sums)
        sums = sums[:TEST] if self.split == "test" else [*sums[TEST:], *EXAMPLES]
        drawn = random.Random(f"{self.seed}/{self.split}").sample(sums, len(sums))[: self.count]
        shown = [turn for terms in EXAMPLES[: self.examples] for turn in turns(_question(terms), _solution(terms))]
        return [self._problem(terms, shown) for terms in drawn]

    def _problem(self, terms: tuple[int, ...], shown: list[dict[str, str]]) -> Problem:
        text = _question(terms)
        return Problem(text, text, str(sum(terms)), (_solution(terms),), messages=(*shown, *turns(text)))


def check_amounts(source: Any, train: int, examples: int, what: str) -> None:
    """ValueError for a split, a count or examples that made problems do not have: `train` of them, or TEST, and `examples` worked ones."""
    if source.split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {source.split!r}')
    most = TEST if source.split == "test" else train
    if not 1 <= source.count <= most:
        raise ValueError(f"count must be from 1 to {most}, as there are no more {what} in {source.split}, got {source.count}")
    if not 0 <= source.examples <= examples:
        raise ValueError(f"examples must be from 0 to {examples}, got {source.examples}")


def turns(question: str, answer: str = "") -> list[dict[str, str]]:
    """A question as a turn of the chat and, where there is one, its answer."""
    return [{"role": "user", "content": question}, *([{"role": "assistant", "content": answer}] if answer else [])]


def _question(terms: tuple[int, ...]) -> str:
    return f"What is {' + '.join(map(str, terms))}?"


def _solution(terms: tuple[int, ...]) -> str:
    a, b, c = terms
    return f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}. The answer is \\boxed{{{a + b + c}}}."
