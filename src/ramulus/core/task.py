"""What is to be solved, and what a solution is worth."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """One problem as the model sees it, and what a verifier needs to judge an attempt.

    Example:
        >>> from ramulus import Task
        >>> Task("sum", prompt=(1, 2), text="1+2?", answer="3").answer
        '3'
    """

    id: str  # unique in its source; seeds and the visit count hang on it
    prompt: tuple[int, ...]  # token ids, chat template and generation prompt included
    text: str  # the problem as a person reads it
    answer: str = ""  # the reference answer
    demonstrations: tuple[tuple[int, ...], ...] = ()  # token ids of worked solutions, each with its EOS
    extra: dict[str, Any] = field(default_factory=dict)  # what a scorer needs beyond the answer; plain JSON


@dataclass(frozen=True, slots=True)
class Path:
    """The response of one leaf, as a reward function sees it.

    Example:
        >>> from ramulus import Path
        >>> Path("4", (7,), "eos").length
        1
    """

    text: str  # decoded response; of special tokens those that begin, end or fill a text are left out
    tokens: tuple[int, ...]  # response token ids, prompt excluded
    finish: str | None  # eos, answer, length, repetition, pruned

    @property
    def length(self) -> int:
        """The number of response tokens."""
        return len(self.tokens)


Verdict = float | dict[str, Any]
Reward = Callable[[Task, Path], Verdict | Awaitable[Verdict]]  # a dict carries `reward` and parts such as `correct`


class GraderLost(RuntimeError):
    """What grades cannot run, whatever the answer; the message says what to do about it."""
