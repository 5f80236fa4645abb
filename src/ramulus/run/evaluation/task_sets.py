"""The sets of problems that a command line asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ramulus.core.task import Reward, Task
from ramulus.tasks.chain import ChainAnswer, ChainSum
from ramulus.tasks.chat import arguments_of
from ramulus.tasks.files import File
from ramulus.tasks.problem import Source, render
from ramulus.tasks.sums import TEST, Sums
from ramulus.tasks.word_problems import WordProblems


@dataclass(frozen=True)
class ProblemOptions:
    """How problems become prompts, and where the model runs.

    Attributes:
        prompt: column of a file that holds the problems; verl's columns are known.
        answer: column of a file that holds the answers.
        split: of a Hugging Face dataset.
        prompt_limit: the longest prompt; longer ones are left out, and counted.
        template: prompt with {problem} in it, in place of the chat template.
        system: system message of the chat template.
        template_arguments: what else the chat template reads, as JSON, such as {"enable_thinking": false}.
        date: YYYY-MM-DD, for chat templates that write one; by default the day on which the evaluation began.
        slots: rows decoded together.
        device: cpu, cuda, cuda:1, or auto.
        threads: of torch; all cores by default.
    """

    prompt: str = "problem"
    answer: str = "answer"
    split: str | None = None
    prompt_limit: int = 2048
    template: str | None = None
    system: str | None = None
    template_arguments: str | None = None
    date: str = ""
    slots: int = 64
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class TaskSets:
    """The problems asked for on the command line, and how they become prompts."""

    specs: tuple[str, ...]
    limit: int | None
    options: ProblemOptions = ProblemOptions()

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is a number of problems, at least 1, got {self.limit}")

    def read(self, tokenizer: Any, date: str = "") -> list[tuple[str, list[Task], Reward]]:
        """(name, tasks, grader) of each set; prompts that are too long are left out with a warning. `date` is what chat templates may write."""
        how, sets = self.options, []
        for spec in self.specs:
            source, reward = _source_of(spec, self.limit, how)
            given = arguments_of(how.template_arguments)
            tasks = render(source(), tokenizer, how.template, how.system, how.prompt_limit, "drop", given, how.date or date)
            if not tasks:
                raise ValueError(f"no problem of {spec} has a prompt of at most {how.prompt_limit} tokens: raise --prompt-limit")
            sets.append((spec, tasks, reward))
        return sets


def _source_of(spec: str, limit: int | None, options: ProblemOptions) -> tuple[Source, Reward]:
    """Problems and their grader: `chain`, `sums`, `word_problems`, `gym:NAME`, or a file of boxed mathematics."""
    if spec == "chain":
        return ChainSum(limit or 100, "test"), ChainAnswer()
    if spec.startswith("gym:"):
        from ramulus.tasks.gym import Gym, GymScore

        return Gym(spec[4:], size=limit or 100), GymScore()
    from ramulus.tasks.math import Boxed

    if spec == "sums":
        return Sums(min(limit or TEST, TEST), "test"), Boxed()
    if spec == "word_problems":
        return WordProblems(min(limit or TEST, TEST), "test"), Boxed()
    return File(spec, prompt=options.prompt, answer=options.answer, split=options.split, limit=limit), Boxed()
