"""The sets of problems that a command line asks for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ramulus.core.checksums import digest_of_all
from ramulus.core.recipe_part import is_part
from ramulus.core.task import Reward, Task
from ramulus.grow.grading import Rewards
from ramulus.run.config.own_code import code_digests
from ramulus.run.config.weighted import REWARD_CODE, reward_digest
from ramulus.run.prompts import extracting, extraction_of
from ramulus.tasks.answers import extraction
from ramulus.tasks.chain import ChainAnswer, ChainSum
from ramulus.tasks.chat import arguments_of, chat_template
from ramulus.tasks.examples import after_examples, worked_examples
from ramulus.tasks.files import File
from ramulus.tasks.problem import Problem, Source, render
from ramulus.tasks.rows import no_split
from ramulus.tasks.sums import TEST, Sums
from ramulus.tasks.word_problems import WordProblems


@dataclass(frozen=True)
class ProblemOptions:
    """How problems become prompts, and where the model runs.

    Attributes:
        prompt: column of a file that holds the problems, by default that of the run's file, or `problem`; verl's columns are known.
        answer: column of a file that holds the answers, by default that of the run's file, or `answer`; `none` for problems without.
        split: of a Hugging Face dataset.
        prompt_limit: the longest prompt, by default that of the run, or 2048 tokens; longer ones are left out, and counted.
        template: prompt with {problem} in it, in place of the chat template; this and the next two are by default those of the run.
        system: system message of the chat template.
        template_arguments: what else the chat template reads, as JSON, such as {"enable_thinking": false}.
        examples: a file of worked problems, which are shown before each one (few-shot); by default those of the run, `none` for none.
        solution: column of that file that holds worked solutions; without one the examples show the answer, in the form that the grader reads.
        extract: where in a response the answer is looked for: box, number, line, whole, tag or tag:NAME; by default where the grader looks.
        date: YYYY-MM-DD, for chat templates that write one; by default the day on which the evaluation began.
        slots: rows decoded together.
        device: cpu, cuda, cuda:1, or auto.
        threads: of torch; all cores by default.
    """

    prompt: str | None = None
    answer: str | None = None
    split: str | None = None
    prompt_limit: int | None = None
    template: str | None = None
    system: str | None = None
    template_arguments: str | None = None
    examples: str | None = None
    solution: str | None = None
    extract: str | None = None
    date: str = ""
    slots: int = 64
    device: str = "auto"
    threads: int | None = None


PROMPTING = ("template", "system", "template_arguments", "examples")  # settings of an evaluation: what stands around each problem
HELD_OUT_SET = "evals"  # the set of problems that a run holds out


@dataclass(frozen=True)
class TaskSets:
    """The problems asked for on the command line, how they become prompts, and what grades them."""

    specs: tuple[str, ...]
    limit: int | None
    options: ProblemOptions = ProblemOptions()
    rewards: Rewards | None = None  # None: those of the run, or the usual one of each set
    run: Any = None  # Run: the model's own, whose template and limits are taken where none are asked for

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is a number of problems, at least 1, got {self.limit}")

    def read(self, tokenizer: Any, date: str = "") -> list[tuple[str, list[Task], Rewards]]:
        """(name, tasks, graders) of each set; prompts that are too long are left out with a warning. `date` is what chat templates may write."""
        how, run, sets = self.options, self.run, []
        template, system, arguments = self._around()
        shown = self._examples
        longest = how.prompt_limit or (run.prompt_limit if run is not None else 2048)
        date = how.date or (run.date if run is not None else "") or date
        for spec in self.specs:
            source, rewards = self._set(spec, len(shown))
            if how.extract is not None:
                rewards = extracting(rewards, extraction(how.extract))
            examples = worked_examples(shown, extraction_of(rewards))
            chat = bool(examples) and template is None and chat_template(tokenizer, arguments, date) is not None
            problems, form, before = after_examples(source(), examples, template, chat)
            tasks = render(problems, tokenizer, form, system, longest, "drop", arguments, date, before)
            if not tasks:
                raise ValueError(f"no problem of {spec} has a prompt of at most {longest} tokens: raise --prompt-limit")
            sets.append((spec, tasks[: self.limit], rewards))
        return sets

    def _around(self) -> tuple[str | None, str | None, dict[str, Any] | None]:
        """Template, system message and what else the chat template reads: as asked for, else those of the run."""
        how, run = self.options, self.run
        template, system, arguments = how.template, how.system, arguments_of(how.template_arguments)
        if run is not None:
            template = run.template if template is None and system is None and arguments is None else template
            system = run.system if system is None and how.template is None else system
            arguments = run.template_arguments if arguments is None and how.template is None else arguments
        return template, system, arguments

    @property
    def prompting(self) -> dict[str, Any]:
        """What stands around each problem, None where nothing does: template, system message, what the chat template reads, a digest of examples."""
        shown = self._examples
        examples = digest_of_all((problem.text, problem.answer, problem.demonstrations) for problem in shown) if shown else None
        return dict(zip(PROMPTING, (*self._around(), examples), strict=True))

    @cached_property
    def _examples(self) -> list[Problem]:
        """The worked problems that are shown before each one."""
        if self.options.examples is None:
            return self.run.examples() if self.run is not None and self.run.examples is not None else []
        if self.options.examples.lower() == "none":
            return []
        return replace(self._file(self.options.examples), demonstration=self.options.solution)()

    def _file(self, path: str) -> File:
        """A file read as the run's file is, whose columns hold where no others are asked for; further ones where the run's rewards grade."""
        how, trained = self.options, self.run.tasks if self.run is not None else None
        like = trained if isinstance(trained, File) else File("")
        asked: dict[str, Any] = {name: word for name in ("prompt", "answer") if (word := getattr(how, name)) is not None}
        if asked.get("answer", "").lower() == "none":
            asked["answer"] = None
        keep = like.keep if self.rewards is None else ()
        why = how.split and no_split(path, how.split)
        if why:
            warnings.warn(f"--split {how.split} says nothing of {path}: it {why}", stacklevel=2)
        return File(path, split=None if why else how.split, layout=like.layout, keep=keep, **{"prompt": like.prompt, "answer": like.answer} | asked)

    def _set(self, spec: str, more: int) -> tuple[Source, Rewards]:
        """Problems, `more` than the limit as some may be among the worked examples, and what grades them."""
        run = self.run
        if spec == HELD_OUT_SET and run is not None:
            return self._held_out() or run.tasks, self.rewards or run.weighted()
        source, reward = _source_of(spec, self.limit and self.limit + more, self._file(spec))
        by_run = run is not None and isinstance(source, File) and run.weighted()
        return source, self.rewards or by_run or [(reward, 1.0, "correct answer")]

    def _held_out(self) -> Source | None:
        """The problems that the run holds out, if any."""
        final = self.run.final_evaluation
        return self.run.evals or (final.tasks if final is not None else None)

    @property
    def caution(self) -> str:
        """What is said before a run without held-out problems is measured; "" of every other."""
        if self.run is None or HELD_OUT_SET not in self.specs or self._held_out() is not None:
            return ""
        return "this run holds no problems out, so it is measured on those that it was trained on; --tasks FILE measures it on others"

    @property
    def graders(self) -> dict[str, Any]:
        """What grades, in words and as a digest, where it is not the usual of each set: what an earlier evaluation must have been graded by."""
        rewards = tuple(self.rewards or (self.run.weighted() if self.run is not None else ()))
        names = [f"{weight:g} x {name}" for _, weight, name in rewards]
        names += [] if self.options.extract is None else [f"reading {self.options.extract}"]
        return ({"rewards": names} if names else {}) | ({REWARD_CODE: reward_digest(rewards)} if rewards else {})

    @property
    def stops(self) -> dict[str, Any]:
        """What ends a response of the run besides its end and its length: `answer` and `repetition` of a `Stop`, where it has them."""
        rules = {} if self.run is None else {"answer": self.run.answer, "repetition": self.run.repetition}
        return {name: rule for name, rule in rules.items() if rule is not None}

    @property
    def endings(self) -> dict[str, str]:
        """The same as text that means the same in another process: one's own code by its digest."""
        return {name: ending_text(rule) for name, rule in self.stops.items()}


def ending_text(rule: Any) -> str:
    """A rule as text, which for a function, or an object that is no dataclass, is its name; with a digest of code that is not ramulus' own."""
    shown = repr(rule) if is_part(rule) else getattr(rule, "__qualname__", type(rule).__qualname__)
    code = code_digests(rule)
    return f"{shown} {code}" if code else shown


def _source_of(spec: str, limit: int | None, file: File) -> tuple[Source, Reward]:
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
    return replace(file, limit=limit), Boxed()
