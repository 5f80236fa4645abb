"""Grading: the rewards of a recipe asked about every path of a tree, and their answers checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ramulus.core.task import GraderLost, Path, Reward, Task
from ramulus.core.tree import Node, Tree
from ramulus.engine.engine import together
from ramulus.grow.branching import paths
from ramulus.grow.stop import Decode
from ramulus.grow.threads import in_thread

Rewards = Sequence[tuple[Reward, float, str]]
"""(reward, weight in the total, name of its part in the verdict) of each."""

_SLACK = 1e-6  # by which a share that was added up may miss 0 or 1
NO_REWARD = ("correct", "answer")  # names in a verdict that no reward's value takes: it is NAME_reward there
PATIENCE = 0.005  # seconds for which the plain rewards of a tree share one thread


class RewardError(ValueError):
    """A reward raised, or returned what is no reward; names the reward, the task and the remedy."""


async def grade(
    tree: Tree, rewards: Rewards, decode: Decode, filter_overlong: bool = False, leaves: Sequence[Node] | None = None
) -> Tree:
    """Give every ended policy path that was not pruned its reward (the weighted total) and its verdict; once, not again.

    The verdict holds each reward's value by name (that of one called `correct` or `answer` as NAME_reward), `correct` and
    `answer` from the first reward that tells them, and any other part as NAME/PART. Rewards run concurrently, plain functions
    in threads. With `filter_overlong` a path that ended by length has a verdict but no reward: it is in no mean
    and no gradient. `leaves` are graded in place of the policy's where given. Raises RewardError.
    """
    leaves = paths(tree) if leaves is None else leaves
    leaves = [leaf for leaf in leaves if leaf.finish not in (None, "pruned") and not leaf.verdict]
    if leaves and not rewards:
        raise ValueError("sampled paths cannot be graded without a reward: give at least one")
    calls = []
    for leaf in leaves:
        tokens = tuple(leaf.response())
        path = Path(decode(list(tokens)), tokens, leaf.finish)
        calls.append([Call(reward, name, tree.task, path) for reward, _, name in rewards])
    await settle_all([call for of_leaf in calls for call in of_leaf])
    for leaf, of_leaf in zip(leaves, calls, strict=True):
        total = 0.0
        leaf.verdict = {}
        for call, (_, weight, name) in zip(of_leaf, rewards, strict=True):
            total += weight * call.parts["reward"]
            leaf.verdict[f"{name}_reward" if name in NO_REWARD else name] = call.parts["reward"]
            for key, value in call.parts.items():
                if key != "reward":
                    leaf.verdict.setdefault(key if key in NO_REWARD else f"{name}/{key}", value)
        if leaf.verdict.get("correct_reward") in (0.0, 1.0):
            leaf.verdict.setdefault("correct", leaf.verdict["correct_reward"])  # a reward of that name that says yes or no
        leaf.reward = None if filter_overlong and leaf.finish == "length" else total
    return tree


@dataclass(eq=False, slots=True)
class Call:
    """One reward asked about one path: first called, then settled."""

    reward: Reward
    name: str
    task: Task
    path: Path
    answer: Any = None  # as returned; perhaps something to await
    error: Exception | SystemExit | None = None
    since: float = 0.0  # when it was called, by time.monotonic()
    parts: dict[str, Any] = field(default_factory=dict)  # when settled: numbers and strings, `reward` a finite float

    def make(self) -> None:
        """Call the reward. An error is kept, not raised: a StopIteration must not reach a future, it would hang there."""
        self.since = time.monotonic()
        try:
            self.answer = self.reward(self.task, self.path)
        except GraderLost as error:
            raise RewardError(f"{self}: {error}") from error
        except (Exception, SystemExit) as error:
            self.error = error

    def at_work(self) -> bool:
        """Whether it was called and has not answered."""
        called = self.since > 0 and self.error is None and not self.parts
        return called and (self.answer is None or inspect.isawaitable(self.answer))

    def pending(self) -> bool:
        """Whether there is an error to raise or an answer to wait for."""
        return self.error is not None or inspect.isawaitable(self.answer)

    async def settle(self) -> None:
        """Wait for the answer where that is needed, and check it; raises RewardError."""
        try:
            if self.error is not None:
                raise self.error
            if inspect.isawaitable(self.answer):
                self.answer = await self.answer
        except GraderLost as error:
            raise RewardError(f"{self}: {error}") from error
        except (Exception, SystemExit) as error:
            remedy = wrong_call(self.reward) or "let it return a number for any text a model may write"
            raise RewardError(f"{self} raised {type(error).__name__}: {error}; {remedy}") from error
        self.check()

    def check(self) -> None:
        """Take the parts out of an answer; raises RewardError where it is none."""
        try:
            self._take()
        except OverflowError as error:
            raise RewardError(f"{self} returned a number beyond what a float holds ({error}): return a smaller one") from error

    def _take(self) -> None:
        given = self.answer if isinstance(self.answer, dict) else {"reward": self.answer}
        parts = {key: scalar(value) for key, value in given.items()}
        if not isinstance(parts.get("reward"), Real) or not math.isfinite(float(parts["reward"])):
            remedy = "it must return a finite number, or a dict with one as 'reward'"
            raise RewardError(f"{self} returned {self.answer!r}: {remedy}")
        for key, value in parts.items():
            if not isinstance(key, str) or not isinstance(value, Real | str):
                remedy = "the parts of a reward are numbers or strings by name"
                raise RewardError(f"{self} returned {value!r} as {key!r}: {remedy}")
        if not isinstance(called := parts.get("correct", 0.0), Real) or not -_SLACK <= float(called) <= 1 + _SLACK:
            remedy = "it must be 1 or True where the path solves its task, 0 or False where not, or a share between"
            raise RewardError(f"{self} returned {called!r} as 'correct': {remedy}")
        if "correct" in parts:
            parts["correct"] = min(max(float(called), 0.0), 1.0)
        self.parts = {key: value if isinstance(value, str) else float(value) for key, value in parts.items()}

    def __str__(self) -> str:
        return f"reward {self.name!r} on task {self.task.id!r}"


def wrong_call(reward: Reward) -> str:
    """How a reward is called, where it cannot be called so; "" for one that can."""
    try:
        inspect.signature(reward).bind(None, None)
    except TypeError:
        name = getattr(reward, "__name__", "reward")
        return f"a reward is called with a task and a path: write def {name}(task, path) -> float"
    except ValueError:  # builtins that do not say
        return ""
    return ""


ASKED: set[Call] = set()
"""The calls that somebody waits for, for whoever wants to say so."""


def scalar(value: Any) -> Any:
    """A number of numpy or torch (np.bool_, an array or tensor of one element) as Python's; anything else as it is."""
    shape = None if isinstance(value, Real | str) else getattr(value, "shape", None)
    return value.item() if shape is not None and callable(getattr(value, "item", None)) and math.prod(shape) == 1 else value


async def settle_all(calls: Sequence[Call]) -> None:
    """Make and settle calls, all side by side: coroutine functions in this loop, plain functions in threads. Raises RewardError."""
    rewards = {id(call.reward): call.reward for call in calls}
    in_loop = {key for key, reward in rewards.items() if is_coroutine_function(reward)}
    plain = [call for call in calls if id(call.reward) not in in_loop]
    ASKED.update(calls)
    try:
        await together([run_plain(plain), *(run_in_loop(call) for call in calls if id(call.reward) in in_loop)])
    finally:
        ASKED.difference_update(calls)


def outstanding() -> list[Call]:
    """The calls that are at work now, the longest first."""
    return sorted((call for call in ASKED.copy() if call.at_work()), key=lambda call: call.since)


def is_coroutine_function(reward: Reward) -> bool:
    """Whether a reward, or its `__call__`, is one."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


async def run_in_loop(call: Call) -> None:
    """For a coroutine function: the call itself returns at once."""
    call.make()
    await call.settle()


async def run_in_thread(call: Call) -> None:
    """For a plain function: it never holds up the sampling."""
    await in_thread(call.make)
    await call.settle()


async def run_plain(calls: Sequence[Call]) -> None:
    """Plain functions: one thread makes the calls in turn for PATIENCE seconds; those not begun by then get a thread each."""
    if not calls:
        return
    queue = iter(calls)  # whoever takes the next call makes it; the shared thread and this loop both take
    shared: list[Call] = []

    def take_turns() -> None:
        for call in queue:
            shared.append(call)
            call.make()

    turns = asyncio.ensure_future(in_thread(take_turns))
    try:
        await asyncio.wait({turns}, timeout=PATIENCE)
        await together([turns, *(run_in_thread(call) for call in queue)])
    finally:
        deque(queue, 0)  # the shared thread goes no further
    pending = [call for call in shared if call.pending()]
    ready = [call for call in shared if not call.pending()]
    await together(call.settle() for call in pending)
    for call in ready:
        call.check()
