r"""Mathematics with a boxed answer. What an answer says is read and compared by rules of our own (equality.py), which are cheap and bounded;
sums, integrals and limits go to math-verify in worker processes that are killed at a time limit.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from typing import Any

from ramulus.core.task import GraderLost, Path, Task
from ramulus.core.text import reference_said
from ramulus.tasks.answers import READ, Extract, LastBox
from ramulus.tasks.equality import same
from ramulus.tasks.latex import LONGEST_ANSWER, unwrap
from ramulus.tasks.problem import references
from ramulus.tasks.workers import worker_pool

SHORT = 200  # characters of an answer that is compared in this process, in a few milliseconds
_CALCULUS = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|det)(?![a-zA-Z])")


@dataclass(frozen=True)
class Boxed:
    r"""`correct` if the last complete \boxed{...} equals a reference answer, else `wrong`.

    What cannot be graded within `seconds` of computing, or makes the grader fail, is wrong, with the `reason` in the verdict.
    `window`: the box must lie within the last so many characters of the response (DAPO and HAPO use 300).

    Example:
        >>> import asyncio
        >>> from ramulus import Boxed, Path, Task
        >>> asyncio.run(Boxed()(Task("t", (1,), "1/2?", answer="0.5"), Path(r"\boxed{\frac12}", (1, 2), "eos")))["correct"]
        1.0
    """

    correct: float = 1.0
    wrong: float = 0.0
    window: int | None = None
    longest: int = LONGEST_ANSWER  # characters of an answer; a longer one is wrong and not tried
    extract: Extract = field(default_factory=LastBox, metadata=READ)
    seconds: float = 5.0
    workers: int = 2
    gigabytes: float | None = 4.0  # of address space for each worker: 9^{9^{9}} fills any memory

    def __post_init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError('grading mathematics needs math-verify: pip install "ramulus[math]"')
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is a number of characters, at least 1, got {self.window}")
        if self.seconds <= 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")

    async def __call__(self, task: Task, path: Path) -> dict[str, Any]:
        answer = self.extract(path.text if self.window is None else path.text[-self.window :])
        if answer is None:
            where = "" if self.window is None else f" in the last {self.window} characters"
            return self._verdict(False, "", f"no answer found{where}")
        right, reason = await self._grade(tuple(map(reference_said, references(task))), answer)
        return self._verdict(right, answer, reason)

    async def _grade(self, right: tuple[str, ...], answer: str) -> tuple[bool, str]:
        if any(answer == reference.strip() for reference in right):
            return True, ""
        if len(answer) > self.longest:
            return False, f"the answer has {len(answer)} characters, more than {self.longest}"
        if len(answer) <= SHORT:
            verdicts = [same(reference, answer) for reference in right]
            if True in verdicts or not any(needs_algebra(text) for text in (*right, answer)):
                return True in verdicts, ""
        outcome = await worker_pool(self.workers, self.gigabytes).run(Equal(), right, answer, seconds=self.seconds, once=True)
        if outcome.cause == "broken":
            raise GraderLost(f"the grader of mathematics cannot run: {outcome.failure}")
        return bool(outcome.value), "" if outcome.failure is None else f"{outcome.cause}: {outcome.failure}"

    def _verdict(self, right: bool, answer: str, reason: str) -> dict[str, Any]:
        verdict = {"reward": self.correct if right else self.wrong, "correct": float(right), "answer": answer[:1000]}
        return verdict | {"reason": reason} if reason else verdict


@dataclass(frozen=True)
class Equal:
    """Whether an answer equals one of the references. Runs in a worker: it may hang, fill the memory or raise."""

    def prepare(self) -> None:
        """Import math-verify and grade once, which builds its tables: about a second, once per worker, on nobody's clock."""
        import logging

        import math_verify  # noqa: F401

        logging.getLogger("math_verify").setLevel(logging.ERROR)
        if not _warm:
            _warm.append(algebra(r"\frac{1}{2}", "x+1"))

    def __call__(self, right: tuple[str, ...], answer: str) -> bool:
        return any(_equal(reference, answer) for reference in right)


_warm: list[bool] = []  # not empty once this worker has graded


def _equal(reference: str, answer: str) -> bool:
    verdict = same(reference, answer)
    algebraic = verdict is None and (needs_algebra(reference) or needs_algebra(answer))
    return algebra(reference, answer) if algebraic else bool(verdict)


def needs_algebra(text: str) -> bool:
    """Whether there is a sum, an integral, a limit, a determinant or a computation with matrices in a text."""
    return _CALCULUS.search(text) is not None or text.count(r"\begin{") > 1


def algebra(reference: str, answer: str) -> bool:
    """math-verify's judgement. Its own time limits are off: they are alarms inside the process, ours kill the process."""
    from math_verify import parse, verify

    one, other = (parse(rf"\boxed{{{unwrap(text)}}}", parsing_timeout=None) for text in (reference, answer))
    return bool(one and other) and verify(one, other, timeout_seconds=None)
