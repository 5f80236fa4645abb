"""Worked examples before a problem (few-shot): earlier turns of its chat, or text in front of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ramulus.tasks.answers import Extract, response_with
from ramulus.tasks.chat import content_text
from ramulus.tasks.problem import Problem, check_fields, stands_alone


@dataclass(frozen=True)
class WorkedExample:
    """A question, and the answer that a model is shown."""

    question: str
    solution: str
    system: str = ""  # the system message that stood before it, which is shown nowhere


def worked_examples(problems: Iterable[Problem], extract: Extract | None) -> list[WorkedExample]:
    r"""The problems with their first demonstration, else with their answer alone; where `extract` finds no answer in it, one that it finds is added.

    Raises ValueError as `check_fields` does, for a problem that has neither, and for one whose chat has turns that its text has not.
    """
    shown = []
    for problem in check_fields(problems):
        if not problem.demonstrations and not problem.answer.strip():
            raise ValueError(f"the example {problem.id!r} has neither a demonstration nor an answer: name its column, examples.answer=...")
        roles = {message["role"] for message in problem.messages or ()}
        if not roles <= {"system", "user"} and not stands_alone(problem):
            raise ValueError(f"the example {problem.id!r} is a chat of several turns, of which only the user's would be shown: leave it out")
        response = response_with(extract, problem.answer) if extract is not None and problem.answer.strip() else problem.answer
        solution = problem.demonstrations[0] if problem.demonstrations else response or problem.answer
        if extract is not None and response and extract(solution) is None:
            solution = f"{solution}\n{response}"
        shown.append(WorkedExample(problem.text, solution, system_text(problem)))
    return shown


def after_examples(
    problems: Sequence[Problem], examples: Sequence[WorkedExample], template: str | None, chat: bool
) -> tuple[list[Problem], str | None, str]:
    """(problems, template, text before every prompt) that show the examples before each problem, behind a system message that it has; problems
    among them are left out.

    `chat`: as turns of the chat template; else the template, or the bare text, is written once for each, with its solution and an empty line. Raises
    ValueError where no problem is left, and as `check_fields` does.
    """
    problems = check_fields(problems)
    if not examples:
        return problems, template, ""
    _warn_of_systems(problems, examples)
    given_away = {example.question for example in examples}
    kept = [problem for problem in problems if problem.text not in given_away]
    if problems and not kept:
        raise ValueError(f"all {len(problems)} problems are among the worked examples: take examples from another file, or other problems")
    if len(kept) < len(problems):
        warnings.warn(f"left out {len(problems) - len(kept)} of {len(problems)} problems, which are among the examples", stacklevel=2)
    if template is None and chat:
        return [replace(problem, messages=_messages(problem, examples)) for problem in kept], None, ""
    form = template if template is not None else "{problem}\n"
    texts = [form.replace("{problem}", example.question) for example in examples]
    gaps = ["" if text.endswith(("\n", " ")) else " " for text in texts]
    shown = "".join(f"{text}{gap}{example.solution}\n\n" for text, gap, example in zip(texts, gaps, examples, strict=True))
    return kept, form, shown


def system_text(problem: Problem) -> str:
    """The system message of a problem's chat; "" where it has none."""
    return next((content_text(turn.get("content"), problem.id) for turn in problem.messages or () if turn["role"] == "system"), "")


def _warn_of_systems(problems: Sequence[Problem], examples: Sequence[WorkedExample]) -> None:
    """Warn of examples that had another system message than the problems after them, as it is not shown."""
    theirs = {system_text(problem) for problem in problems}
    if other := [example.system for example in examples if example.system and theirs - {example.system}]:
        warnings.warn(
            f"the system messages of {len(other)} worked examples, the first {other[0][:60]!r}, are not shown, and not every problem has the same: "
            "set system=... for a message before all",
            stacklevel=3,
        )


def _messages(problem: Problem, examples: Sequence[WorkedExample]) -> tuple[dict[str, str], ...]:
    """The chat of a problem with the examples as turns before its own."""
    given = problem.messages or ({"role": "user", "content": problem.text},)
    start = 1 if given[0]["role"] == "system" else 0
    turns = [turn for example in examples for turn in (("user", example.question), ("assistant", example.solution))]
    return (*given[:start], *({"role": role, "content": content} for role, content in turns), *given[start:])
