"""The problems of a run as prompts: its template, system message and worked examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ramulus.core.task import Task
from ramulus.run.config.recipe import Run
from ramulus.tasks.answers import Extract
from ramulus.tasks.chat import chat_template
from ramulus.tasks.examples import after_examples, worked_examples
from ramulus.tasks.gym import GymScore
from ramulus.tasks.math import Boxed
from ramulus.tasks.problem import Problem, render
from ramulus.tasks.rewards import ExactAnswer


def prompts_of(run: Run, sources: Iterable[Sequence[Problem]], tokenizer: Any) -> list[list[Task]]:
    """The tasks of each list of problems. Raises ValueError as `render` and `worked_examples` do."""
    examples = worked_examples(run.examples(), extraction_of(run)) if run.examples is not None else []
    chat = chat_template(tokenizer, run.template_arguments, run.date) is not None
    tasks = []
    for problems in sources:
        shown, template = after_examples(problems, examples, run.template, chat)
        tasks.append(render(shown, tokenizer, template, run.system, run.prompt_limit, run.on_long, run.template_arguments, run.date))
    return tasks


def extraction_of(run: Run) -> Extract | None:
    """Where the run's first reward that reads an answer looks for it."""
    return next((reward.extract for reward, _, _ in run.weighted() if isinstance(reward, Boxed | ExactAnswer | GymScore)), None)
