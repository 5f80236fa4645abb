"""The problems of a run as prompts: its template, system message and worked examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ramulus.core.task import Task
from ramulus.grow.grading import Rewards
from ramulus.tasks.answers import Extract
from ramulus.tasks.chat import chat_template
from ramulus.tasks.examples import after_examples, worked_examples
from ramulus.tasks.gym import GymScore
from ramulus.tasks.math import Boxed
from ramulus.tasks.problem import Problem, render
from ramulus.tasks.rewards import ExactAnswer

if TYPE_CHECKING:  # it imports torch, and the command line answers without
    from ramulus.run.config.recipe import Run

EXTRACTING = (Boxed, ExactAnswer, GymScore)  # rewards that look for an answer in the response


def prompts_of(run: Run, sources: Iterable[Sequence[Problem]], tokenizer: Any) -> list[list[Task]]:
    """The tasks of each list of problems. Raises ValueError as `render` and `worked_examples` do."""
    examples = worked_examples(run.examples(), extraction_of(run.weighted())) if run.examples is not None else []
    chat = chat_template(tokenizer, run.template_arguments, run.date) is not None
    tasks = []
    for problems in sources:
        shown, template, before = after_examples(problems, examples, run.template, chat)
        tasks.append(render(shown, tokenizer, template, run.system, run.prompt_limit, run.on_long, run.template_arguments, run.date, before))
    return tasks


def extraction_of(rewards: Rewards) -> Extract | None:
    """Where the first reward that reads an answer looks for it."""
    return next((reward.extract for reward, _, _ in rewards if isinstance(reward, EXTRACTING)), None)


def extracting(rewards: Rewards, extract: Extract) -> list[tuple[Any, float, str]]:
    """The rewards with `extract` in place of where they look for an answer. Raises ValueError where none of them looks for one."""
    if not any(isinstance(reward, EXTRACTING) for reward, _, _ in rewards):
        names = ", ".join(name for _, _, name in rewards)
        kinds = ", ".join(kind.__name__ for kind in EXTRACTING)
        raise ValueError(f"--extract says where an answer is looked for, which {kinds} do; what grades here, {names}, does not: leave it out")
    return [(replace(reward, extract=extract) if isinstance(reward, EXTRACTING) else reward, weight, name) for reward, weight, name in rewards]
