"""References that no answer can match, found before a run begins: each is given to its own grader as a model would write it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ramulus.core.task import Reward, Task
from ramulus.tasks.answers import LastNumber, response_with
from ramulus.tasks.equality import same, wording
from ramulus.tasks.forms import Wording, forms
from ramulus.tasks.math import Boxed
from ramulus.tasks.problem import Problem, references
from ramulus.tasks.rewards import ExactAnswer

_PROSE = re.compile(r"(?:[^\W\d_]{2,}\W+){5}[^\W\d_]{2,}")  # six words in a row


def unmatched(reward: Reward, tasks: Iterable[Task | Problem]) -> list[tuple[str, str]]:
    """(id, why) of each task with no reference that an answer could match; none for rewards that compare no references."""
    if not isinstance(reward, Boxed | ExactAnswer):
        return []
    failures = []
    for task in tasks:
        reasons = [why_not(reward, reference) for reference in references(task)]
        if reasons and all(reasons):
            failures.append((task.id, reasons[0]))
    return failures


def why_not(reward: Boxed | ExactAnswer, reference: str) -> str:
    """Why no answer can match a reference; "" where one can."""
    response = response_with(reward.extract, reference)
    if response is None:
        return ""
    if not reference.strip():
        return "the reference is empty"
    answer = reward.extract(response)
    if answer is None:
        return f"no answer is found in {response[:60]!r}"
    if isinstance(reward, ExactAnswer):
        return "" if answer == reward.expected(reference) else f"{response[:60]!r} gives {answer[:60]!r}"
    if len(answer) > reward.longest:
        return f"it has {len(answer)} characters, more than {reward.longest}"
    if isinstance(reward.extract, LastNumber):
        return f"{response[:60]!r} gives {answer[:60]!r}" if same(reference, answer) is False else ""
    if wording(answer) != wording(reference) or not wording(reference):
        return f"{reference[:60]!r} is not right against itself"
    if _PROSE.search(reference) and all(isinstance(form, Wording) for form in forms(reference)):
        return f"{reference[:60]!r} is prose: only the same words would match"
    return ""
