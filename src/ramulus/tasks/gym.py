"""Any reasoning-gym task by name, with its own scorer and, where they can be derived, step-by-step demonstrations."""

from __future__ import annotations

import ast
import difflib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ramulus.core.tagged_json import decode, encode
from ramulus.core.task import GraderLost, Path, Task
from ramulus.tasks.answers import READ, Extract, Tagged
from ramulus.tasks.arithmetic import worked
from ramulus.tasks.gym_scores import mended
from ramulus.tasks.problem import Problem
from ramulus.tasks.workers import worker_pool

# Scorers of reasoning-gym that evaluate the model's answer as Python; they are not given an answer that could run code.
# eval() sees only literals and plain text, sympy's parse_expr() only plain formulas.
LITERAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
FORMULA = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
_NAMES = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|pi|[A-Za-z]"
_FORMULA = re.compile(rf"(?:(?<![A-Za-z_])(?:{_NAMES})(?![A-Za-z_])|\d+\.?\d*|[-+*/^() ,])*")
DEMONSTRATED = frozenset({"chain_sum", "basic_arithmetic"})


@dataclass(frozen=True)
class Gym:
    """`size` problems of the reasoning-gym task `name`; `config` holds that task's own settings, such as {"max_terms": 4}.

    With `per_problem` = 1 the tasks in DEMONSTRATED get a worked solution that ends in <answer>...</answer>. The first
    problem is number `start`: ranges that do not overlap give held-out problems of the same seed, which may still repeat a
    text (`unique` leaves repeats out, so that fewer than `size` may come). Score with GymScore.

    Example:
        >>> from ramulus import Gym
        >>> Gym("chain_sum", size=2)()[0].id.startswith("chain_sum")
        True
    """

    name: str
    size: int = 500
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    start: int = 0
    unique: bool = True
    per_problem: int = 0
    system: str | None = None  # system message of these problems' chats, before that of the run

    def __post_init__(self) -> None:
        if self.size < 1 or self.start < 0:
            raise ValueError(f"size must be at least 1 and start at least 0, got {self.size} and {self.start}")
        if self.per_problem not in (0, 1) or (self.per_problem and self.name not in DEMONSTRATED):
            raise ValueError(
                f"per_problem={self.per_problem}: at most one demonstration, and only for {sorted(DEMONSTRATED)}, not {self.name!r}"
            )

    def __call__(self) -> list[Problem]:
        dataset = _dataset(self.name, json.dumps(self.config, sort_keys=True), self.seed, self.start + self.size)
        problems: dict[str, Problem] = {}
        for index in range(self.start, self.start + self.size):
            problem = self._problem(dataset[index], index)
            problems.setdefault(problem.text if self.unique else problem.id, problem)
        return list(problems.values())

    def _problem(self, entry: dict[str, Any], index: int) -> Problem:
        answer = "" if entry["answer"] is None else str(entry["answer"])
        extra = {"name": self.name, "config": self.config, "seed": self.seed, "index": index, "entry": encoded(entry)}
        shown = (worked(entry["metadata"]["expression"], answer),) if self.per_problem else ()
        return Problem(f"{self.name}-{self.seed}-{index}", entry["question"], answer, shown, {"gym": extra}, self._messages(entry["question"]))

    def _messages(self, question: str) -> tuple[dict[str, str], ...] | None:
        return None if self.system is None else ({"role": "system", "content": self.system}, {"role": "user", "content": question})


@dataclass(frozen=True)
class GymScore:
    """The score of the task's own scorer, from 0 to 1, in a guarded worker; `correct` is 1 for a full score.

    An answer that the scorer cannot take within the limits, or that could run code in it, scores 0, with the `reason`.

    Example:
        >>> import asyncio
        >>> from ramulus import GymScore, Path, Task
        >>> task = Task("t", (1,), "t", extra={"gym": {"name": "chain_sum"}})
        >>> asyncio.run(GymScore()(task, Path("no tags", (7,), "eos")))["reason"]
        'no answer found'
    """

    extract: Extract = field(default_factory=Tagged, metadata=READ)
    seconds: float = 10.0
    workers: int = 2
    gigabytes: float | None = 8.0

    async def __call__(self, task: Task, path: Path) -> dict[str, Any]:
        if "gym" not in task.extra:
            raise ValueError(f"task {task.id!r} did not come from Gym, GymScore cannot score it")
        answer = self.extract(path.text)
        if answer is None:
            return {"reward": 0.0, "correct": 0.0, "answer": "", "reason": "no answer found"}
        call = Scorer(task.extra["gym"]["name"])
        outcome = await worker_pool(self.workers, self.gigabytes).run(call, task.extra["gym"], answer, seconds=self.seconds, once=True)
        if outcome.cause == "broken":
            raise GraderLost(f"the scorer of {call.name!r} cannot run: {outcome.failure}")
        if outcome.failure is not None:
            return {
                "reward": 0.0,
                "correct": 0.0,
                "answer": answer[:1000],
                "reason": f"{outcome.cause}: {outcome.failure}",
            }
        return {"reward": outcome.value, "correct": float(outcome.value >= 1), "answer": answer[:1000]}


@dataclass(frozen=True)
class Scorer:
    """Scores an answer with reasoning-gym; runs in a worker."""

    name: str

    def prepare(self) -> None:
        """Import reasoning-gym and build the task."""
        _gym()

    def __call__(self, about: dict[str, Any], answer: str) -> float:
        config = json.dumps(about["config"], sort_keys=True)
        dataset = _dataset(about["name"], config, about["seed"], about["index"] + 1)
        entry = dataset[about["index"]] if about["entry"] is None else decode(about["entry"])
        names = {about["name"], str(entry["metadata"].get("source_dataset"))}
        answer = answer.strip()  # what is checked is what the scorer gets
        refused = unsafe(names, answer)
        if refused:
            raise ValueError(refused)
        return mended(names, answer, entry, float(dataset.score_answer(answer, entry) or 0.0))


def unsafe(names: set[str], answer: str) -> str | None:
    """Why this answer must not reach the scorers of these tasks, which would evaluate it as Python; None if it may."""
    if names & LITERAL and not _literal(answer):
        return "neither a literal nor plain text"
    if names & FORMULA and not _FORMULA.fullmatch(answer):
        return "not a plain formula"
    return None


def _literal(answer: str) -> bool:
    """Whether eval() would give a literal, fail on a bare name, or fail as no Python: it can neither act nor read the solution."""
    try:
        tree = ast.parse(answer, mode="eval").body
    except (SyntaxError, ValueError):
        return True
    if isinstance(tree, ast.Name):
        return True
    try:
        ast.literal_eval(tree)
    except (ValueError, TypeError):
        return False
    return True


def encoded(entry: dict[str, Any]) -> Any:
    """An entry of reasoning-gym as plain JSON; None where it holds what cannot be said so, and is made anew for the scorer."""
    try:
        return encode(entry)
    except TypeError:
        return None


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError('reasoning-gym tasks need it: pip install "ramulus[gym]"') from None
    return reasoning_gym


@lru_cache(maxsize=32)
def _dataset(name: str, config: str, seed: int, size: int) -> Any:
    _gym()
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.5)
        known = (
            f"did you mean {', '.join(close)}?"
            if close
            else f"the {len(DATASETS)} known ones are {', '.join(sorted(DATASETS))}"
        )
        raise ValueError(f"reasoning-gym has no task {name!r}: {known}")
    try:
        return create_dataset(name, seed=seed, size=size, **json.loads(config))
    except (TypeError, AssertionError, ValueError) as error:
        fields = sorted(set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"})
        raise ValueError(
            f"reasoning-gym task {name!r} does not take {config}: {error}; its settings are {', '.join(fields)}"
        ) from None
