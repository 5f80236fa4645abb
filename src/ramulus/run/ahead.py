"""Trees of later steps, grown while earlier ones are learned, for samplers that are apart from the trainers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ramulus.core import store
from ramulus.engine.engine import Engine
from ramulus.look.cost.ledger import cost
from ramulus.run.rollouts import Cursor, Rollout, Rollouts, cursor_of_json, cursor_to_json
from ramulus.run.signals import Signals
from ramulus.run.step_progress import StepProgress

RIPE = "ripe"  # the key of a cursor under which the rollouts of later steps lie, each with the cursor after it


@dataclass
class AheadRollouts:
    """The rollouts of `rollouts`, those of the next `most` steps grown while a step is learned; 0 grows each when it is asked for.

    A step's trees are sampled by weights `most` updates older than those that learn from them, fewer in the first steps: how many depends on no
    clock, unless the engine swaps weights in flight. What is ripe is in the cursor, so that a run that goes on learns from the same trees.
    """

    rollouts: Rollouts
    most: int
    last: int  # the last step of the run
    ripe: list[tuple[Rollout, Cursor]] = field(default_factory=list)
    growing: asyncio.Task[None] | None = None
    sampled: int = 0  # tokens, in this step for later ones

    @property
    def signals(self) -> Signals | None:
        return self.rollouts.signals

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        return self.rollouts.decode

    @property
    def stop(self) -> Any:
        return self.rollouts.stop

    @property
    def progress(self) -> StepProgress | None:
        return self.rollouts.progress

    @progress.setter
    def progress(self, progress: StepProgress) -> None:
        self.rollouts.progress = progress if not self.most else None  # trees of several steps grow at once

    async def get(self, step: int, cursor: Cursor) -> tuple[Rollout, Cursor]:
        """The trees of `step`, and the cursor after it; those of later steps grow from now on."""
        kept = cursor.get(RIPE, ())
        cursor = {name: value for name, value in cursor.items() if name != RIPE}
        self.ripe = list(kept)
        if self.ripe:
            rollout, cursor = self.ripe.pop(0)
            rollout = replace(rollout, before=cost_of(rollout), grading=0.0)
        else:
            rollout, cursor = await self.rollouts.get(step, cursor)
        self.sampled = 0
        if self.most:
            after = self.ripe[-1][1] if self.ripe else cursor
            self.growing = asyncio.create_task(self._grow(step + len(self.ripe) + 1, min(step + self.most, self.last), after))
        return self.with_ripe(rollout, cursor)

    async def _grow(self, first: int, last: int, cursor: Cursor) -> None:
        """Grow the rollouts of some steps."""
        for step in range(first, last + 1):
            rollout, cursor = await self.rollouts.get(step, cursor)
            self.sampled += cost_of(rollout)
            self.ripe.append((rollout, cursor))

    async def settled(self, rollout: Rollout, cursor: Cursor) -> tuple[Rollout, Cursor]:
        """A step's rollout and cursor, once nothing grows any more, with what was grown for later steps."""
        growing, self.growing = self.growing, None
        if growing is not None:
            await growing
        return self.with_ripe(rollout, cursor)

    def with_ripe(self, rollout: Rollout, cursor: Cursor) -> tuple[Rollout, Cursor]:
        """A step's rollout and cursor with what is ripe for later steps by now, whatever grows still or has failed."""
        counted = replace(rollout, ahead=self.sampled) if self.sampled else rollout
        return counted, cursor | ({RIPE: list(self.ripe)} if self.ripe else {})

    async def renewed(
        self,
        rollout: Rollout,
        cursor: Cursor,
        engine: Engine,
        load: Callable[[], Awaitable[None]],
        clock: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[Rollout, Cursor]:
        """Load new weights, before or, where the engine swaps in flight, while the last trees grow; rollout and cursor as from `settled`."""
        if "in_flight" not in engine.features:
            with clock("grow"):
                rollout, cursor = await self.settled(rollout, cursor)
        with clock("load"):
            await load()
        with clock("grow"):
            return await self.settled(rollout, cursor)

    async def abandon(self) -> None:
        """Stop growing; it is done again from the last cursor."""
        if self.growing is not None:
            growing, self.growing = self.growing, None
            growing.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await growing


def cost_of(rollout: Rollout) -> int:
    """Tokens that were sampled for a rollout."""
    return cost(rollout.grown).sampled


def ripe_to_json(cursor: Cursor) -> Cursor:
    """A cursor as plain JSON, for a checkpoint."""
    plain = cursor_to_json({name: value for name, value in cursor.items() if name != RIPE})
    return plain | ({RIPE: [[_plain(rollout), ripe_to_json(after)] for rollout, after in cursor[RIPE]]} if RIPE in cursor else {})


def ripe_of_json(cursor: Cursor) -> Cursor:
    """A cursor from what `ripe_to_json` made of it."""
    ripe = [(_rollout(plain), ripe_of_json(after)) for plain, after in cursor.get(RIPE, ())]
    return cursor_of_json(cursor) | ({RIPE: ripe} if ripe else {})


def _plain(rollout: Rollout) -> dict[str, Any]:
    plain = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return plain | {"grown": [store.dump(tree).decode() for tree in rollout.grown]}


def _rollout(plain: dict[str, Any]) -> Rollout:
    return Rollout(**plain | {"grown": [store.load(line.encode()) for line in plain["grown"]]})
