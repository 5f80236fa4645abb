"""Run any reward in a worker process, under a limit on its time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ramulus.core.task import GraderLost, Path, Reward, Task
from ramulus.tasks.workers import worker_pool


@dataclass(frozen=True)
class Guarded:
    """`reward`, killed after `seconds` of computing or `wall` seconds of waiting (default 5 x seconds): then the response earns `wrong`.

    The reward, any plain or async function or frozen dataclass, is pickled into the worker, with its code where it is of no module. Running
    out of memory and taking the worker down count as `wrong` too; an exception of the reward's own is raised as RuntimeError.

    Example:
        >>> import asyncio
        >>> from ramulus import Guarded, Path, Task
        >>> guarded = Guarded(lambda task, path: float(path.text == task.answer), seconds=2.0)
        >>> asyncio.run(guarded(Task("t", (1,), "1+1?", "2"), Path("2", (2,), "eos")))
        1.0
    """

    reward: Reward
    seconds: float = 5.0
    wall: float | None = None
    wrong: float = 0.0
    workers: int = 2
    gigabytes: float | None = 16.0  # of address space; None where the reward computes on a GPU
    network: bool = False  # whether it may reach others: a judge behind a URL needs it
    env: tuple[str, ...] = ()  # names of environment variables that it may see besides PATH and the like

    async def __call__(self, task: Task, path: Path) -> Any:
        outcome = await worker_pool(self.workers, self.gigabytes, self.network, self.env).run(
            self.reward, task, path, seconds=self.seconds, wall=self.wall
        )
        if outcome.cause == "broken":
            raise GraderLost(f"the guarded reward {self.reward!r} cannot run: {outcome.failure}")
        if outcome.cut:
            return {"reward": self.wrong, "reason": f"{outcome.cause}: {outcome.failure}"}
        if outcome.failure is not None:
            raise RuntimeError(f"the guarded reward {self.reward!r} failed on task {task.id!r}: {outcome.failure}")
        return outcome.value
