"""Rewards that need no other library: exact answers, formats, the soft over-long penalty."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ramulus.core.task import Path, Reward, Task
from ramulus.tasks.answers import READ, Extract, LastNumber, Whole
from ramulus.tasks.problem import references


@dataclass(frozen=True)
class ExactAnswer:
    """`correct` if the extracted answer equals a reference answer character by character, else `wrong`.

    Example:
        >>> from ramulus import ExactAnswer, Path, Task
        >>> ExactAnswer()(Task("t", (1,), "1+2?", answer="3"), Path("3", (2,), "eos"))["correct"]
        1.0
    """

    extract: Extract = field(default_factory=Whole, metadata=READ)
    correct: float = 1.0
    wrong: float = 0.0
    ignore_case: bool = False

    def __call__(self, task: Task, path: Path) -> dict[str, Any]:
        fold: Callable[[str], str] = str.casefold if self.ignore_case else str
        answer = self.extract(path.text)
        right = answer is not None and fold(answer) in {fold(self.expected(reference)) for reference in references(task)}
        return {"reward": self.correct if right else self.wrong, "correct": float(right), "answer": answer or ""}

    def expected(self, reference: str) -> str:
        """What an answer is compared with: the reference, or where the last number counts the one in it, as `1234` in `$1,234`."""
        return (self.extract(reference) if isinstance(self.extract, LastNumber) else None) or reference.strip()


@dataclass(frozen=True)
class Format:
    """`correct` if the whole response matches the regular expression (`.` matches newlines), else `wrong`.

    Example:
        >>> from ramulus import Format, Path, Task
        >>> score = Format(r"<think>.*</think>.*")
        >>> score(Task("t", (1,), "t"), Path("<think>1+1</think>2", (7,), "eos")), score(Task("t", (1,), "t"), Path("2", (7,), "eos"))
        (1.0, 0.0)
    """

    pattern: str  # your own: a pattern with nested repeats can take exponential time on a hostile response
    correct: float = 1.0
    wrong: float = 0.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"the format {self.pattern!r} is no regular expression: {error}") from None

    def __call__(self, task: Task, path: Path) -> float:
        return self.correct if re.fullmatch(self.pattern, path.text, re.DOTALL) else self.wrong


@dataclass(frozen=True)
class Unmarked:
    """What `reward` says of the response without these marks: special tokens such as <think> that stay in the text otherwise.

    Example:
        >>> from ramulus import ExactAnswer, Path, Task, Unmarked
        >>> reward = Unmarked(ExactAnswer(), ("<answer>", "</answer>"))
        >>> reward(Task("t", (1,), "1+2?", answer="3"), Path("<answer>3</answer>", (2,), "eos"))["correct"]
        1.0
    """

    reward: Reward
    marks: tuple[str, ...]

    def __call__(self, task: Task, path: Path) -> Any:
        text = path.text
        for mark in self.marks:
            text = text.replace(mark, "")
        return self.reward(task, replace(path, text=text))


@dataclass(frozen=True)
class Overlong:
    """Soft over-long penalty: 0 up to limit - buffer tokens, then linearly down to -penalty at limit (DAPO, arXiv 2503.14476, eq. 13).

    `limit` and `buffer` in response tokens.

    Example:
        >>> from ramulus import Overlong, Path, Task
        >>> Overlong(limit=8, buffer=4)(Task("t", (1,), "t"), Path("", (1,) * 6, "eos"))
        -0.5
    """

    limit: int
    buffer: int
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.limit:
            raise ValueError(f"buffer must be between 1 and the limit of {self.limit} tokens, got {self.buffer}")
        if self.penalty < 0:
            raise ValueError(f"penalty is subtracted and must be >= 0, got {self.penalty}")

    def __call__(self, task: Task, path: Path) -> float:
        over = path.length - (self.limit - self.buffer)
        return -self.penalty * min(max(over, 0) / self.buffer, 1.0)
