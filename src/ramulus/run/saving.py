"""Checkpoints of a stage: their files are written while the trainer waits, and brought to the disk while it takes the next step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramulus.run import checkpoint
from ramulus.run.config.recipe import Run


@dataclass
class Saving:
    """One checkpoint at a time. What a disk answers late (digests are made, files synced, old checkpoints deleted) holds up no step; `settled` says
    that it is done, or what went wrong."""

    run: Run
    on_saved: Callable[[int, Path], None]  # of the step and the place of a new checkpoint, by `settled`
    begun: int = 0  # the step of the last one
    done: int = 0  # of the last one that `on_saved` was told of
    trees: int = 0  # the last step whose trees are on the disk
    under_way: asyncio.Future[None] | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    async def save(
        self,
        step: int,
        files: Callable[[Path], Awaitable[dict[str, Any]]],
        state: dict[str, Any],
        best: int | None,
        rows: Callable[[], None],
    ) -> None:
        """Write the checkpoint of a step and begin to bring it to the disk, after the `rows` of metrics that it follows on. Raises OSError, also for
        the one before."""
        await self.settled()
        written = await checkpoint.write_files(self.run.folder, step, files, state)
        self.under_way = asyncio.get_running_loop().run_in_executor(self.thread, self._finish, step, written, best, rows)
        self.under_way.add_done_callback(_looked_at)
        self.begun = step

    def _finish(self, step: int, written: checkpoint.Written | None, best: int | None, rows: Callable[[], None]) -> None:
        rows()
        self._sync_trees(step)
        if written is not None:
            checkpoint.put_in_place(written)
        checkpoint.drop_old(self.run.folder, self.run.keep, best, self.run.keep_optimizer)

    def _sync_trees(self, step: int) -> None:
        """Have the trees since the last checkpoint, up to this one's step, on the disk: nobody writes them again."""
        files = (self.run.folder / "trees").glob("*.jsonl")
        written = [path for path in files if path.stem.isdigit() and self.trees < int(path.stem) <= step]
        for path in [*written, *(path.parent for path in written[:1])]:
            checkpoint.sync(path)
        self.trees = step

    async def settled(self) -> None:
        """Wait until the last checkpoint is in its place. Raises OSError where it could not be brought there."""
        if self.under_way is not None:
            await asyncio.wait({self.under_way})  # where this wait is cancelled the work goes on, and is waited for the next time
            under_way, self.under_way = self.under_way, None
            under_way.result()
            if self.done != self.begun:
                self.done = self.begun
                self.on_saved(self.done, checkpoint.path_of(self.run.folder, self.done))

    def close(self) -> None:
        """Wait for the checkpoint under way, whatever went wrong."""
        self.thread.shutdown(wait=True)


async def failure_of(work: Callable[[], Awaitable[None]]) -> OSError | None:
    """The OSError that the work raised, or None."""
    try:
        await work()
    except OSError as error:
        return error
    return None


def _looked_at(done: asyncio.Future[None]) -> None:
    """Have asyncio not complain of an error that nobody waited for: a run that ends for another reason says that one."""
    if not done.cancelled():
        done.exception()
