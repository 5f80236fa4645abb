"""Chains of single-digit sums: a task that a half-million-parameter model learns in two minutes, with teachers right and wrong."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ramulus.core.task import Path, Task
from ramulus.tasks.problem import Problem

Teacher = Callable[[list[int], random.Random], list[int]]
"""Maps signed terms to the partial sums that it writes, one for each term after the first."""

TEST_SHARE = 0.2  # of all problem texts; fixed, so that train and test stay apart whatever their sizes and seeds
ENUMERABLE = 60_000  # below this many texts all are listed, above it texts are drawn


@dataclass(frozen=True)
class Right:
    """Writes every partial sum right."""

    def __call__(self, terms: list[int], rng: random.Random) -> list[int]:
        return _follow(terms, lambda total, term: total + term)


@dataclass(frozen=True)
class ForgetsCarry:
    """Has a bad habit: in this share of the steps that cross a ten it writes the right last digit and keeps the old tens.

    A step from a to b crosses a ten when floor(a / 10) != floor(b / 10), so passing below zero counts too. It then writes
    b - 10 after a plus (8+7=5, 18+7=15) and b + 10 after a minus (13-7=16, 3-7=6, -4-8=-2), and goes on from what it wrote.

    Example:
        >>> import random
        >>> from ramulus import ForgetsCarry
        >>> ForgetsCarry(share=1.0)([8, 7, -9], random.Random(0))  # 8+7=5, 5-9=6
        [5, 6]
    """

    share: float = 0.6

    def __call__(self, terms: list[int], rng: random.Random) -> list[int]:
        def step(total: int, term: int) -> int:
            after = total + term
            crosses = total // 10 != after // 10
            return after - (10 if term > 0 else -10) if crosses and rng.random() < self.share else after

        return _follow(terms, step)


def _follow(terms: list[int], step: Callable[[int, int], int]) -> list[int]:
    total, sums = terms[0], []
    for term in terms[1:]:
        total = step(total, term)
        sums.append(total)
    return sums


@dataclass(frozen=True)
class ChainSum:
    """Problems such as `4+7-9+2?`, unique, the same for the same seed, test texts never in train.

    Demonstrations write one partial sum a line and then the answer: `4+7=11`, `11-9=2`, `2+2=4`, `=4`.

    Example:
        >>> from ramulus import ChainSum
        >>> problem = ChainSum(1, terms=(2, 2))()[0]
        >>> problem.text.endswith("?"), len(problem.demonstrations)
        (True, 1)
    """

    count: int
    split: str = "train"
    terms: tuple[int, int] = (3, 6)  # fewest and most terms, each a digit from 1 to 9
    teacher: Teacher = field(default_factory=Right)
    per_problem: int = 1  # demonstrations of each problem
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {self.split!r}')
        if not 2 <= self.terms[0] <= self.terms[1]:
            raise ValueError(f"terms must be (fewest, most) with 2 <= fewest <= most, got {self.terms}")
        if self.count < 1 or self.per_problem < 0:
            raise ValueError(
                f"count must be at least 1 and per_problem at least 0, got {self.count} and {self.per_problem}"
            )

    @property
    def alphabet(self) -> str:
        """Every character that problems and demonstrations are written in."""
        return "0123456789+-=?\n"

    def __call__(self) -> list[Problem]:
        return [self._problem(terms) for terms in self._chains()]

    def _problem(self, terms: list[int]) -> Problem:
        text = _text(terms)
        drawn = random.Random(f"{self.seed}/{text}/teacher")
        shown = tuple(_solution(terms, self.teacher(terms, drawn)) for _ in range(self.per_problem))
        return Problem(text, text, str(sum(terms)), shown)

    def _chains(self) -> list[list[int]]:
        """`count` different chains of this split, in random order."""
        fewest, most = self.terms
        drawn = random.Random(f"{self.seed}/{self.split}")
        everything = sum(9**n * 2 ** (n - 1) for n in range(fewest, most + 1))
        if everything <= ENUMERABLE:
            chains = [chain for n in range(fewest, most + 1) for chain in _all(n) if _split(_text(chain)) == self.split]
            if len(chains) < self.count:
                raise ValueError(
                    f"only {len(chains)} {self.split} problems of {fewest} to {most} terms exist, {self.count} were asked: allow more terms"
                )
            return drawn.sample(chains, self.count)
        most_drawn = int(everything * TEST_SHARE / 4)
        if self.count > most_drawn:  # drawing would slow down long before the texts run out
            raise ValueError(
                f"count {self.count} is too much for chains of {fewest} to {most} terms: ask for at most {most_drawn}"
            )
        distinct: dict[str, list[int]] = {}
        while len(distinct) < self.count:
            chain = _draw(drawn.randint(fewest, most), drawn)
            text = _text(chain)
            if _split(text) == self.split:
                distinct.setdefault(text, chain)
        return list(distinct.values())


def _draw(n: int, rng: random.Random) -> list[int]:
    return [rng.randint(1, 9)] + [rng.choice((1, -1)) * rng.randint(1, 9) for _ in range(n - 1)]


def _all(n: int) -> Iterable[list[int]]:
    signed = [*range(-9, 0), *range(1, 10)]
    return ([first, *rest] for first in range(1, 10) for rest in product(signed, repeat=n - 1))


def _text(terms: list[int]) -> str:
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:]) + "?"


def _split(text: str) -> str:
    """Which split a problem text belongs to, by its hash alone."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return "test" if number < TEST_SHARE * 2**64 else "train"


def _solution(terms: list[int], sums: list[int]) -> str:
    before = [terms[0], *sums]
    lines = [f"{total}{term:+d}={after}" for total, term, after in zip(before, terms[1:], sums)]
    return "\n".join([*lines, f"={sums[-1]}"])


@dataclass(frozen=True)
class ChainAnswer:
    """1 if the last line is `=` and the right number, written plainly; a response cut off at its length limit is wrong.

    Example:
        >>> from ramulus import ChainAnswer, Path, Task
        >>> ChainAnswer()(Task("t", (1,), "4+7?", answer="11"), Path("4+7=11\\n=11", (2,) * 10, "eos"))["correct"]
        1.0
    """

    correct: float = 1.0
    wrong: float = 0.0

    def __call__(self, task: Task, path: Path) -> dict[str, Any]:
        line = path.text.removesuffix("\n").rsplit("\n", 1)[-1]
        answer = line[1:] if line.startswith("=") else ""
        right = answer != "" and answer == task.answer and path.finish != "length"
        return {"reward": self.correct if right else self.wrong, "correct": float(right), "answer": answer}
