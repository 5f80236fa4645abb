"""What stands around an engine and hands on what it does not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ramulus.engine.engine import Engine, SleepingEngine, Weights


class AroundEngine:
    """An engine that is another one but for `sample`, which whoever derives from this writes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.limit, self.features, self.about = engine.limit, engine.features, engine.about

    async def load(self, weights: Weights, version: int) -> None:
        """Hand new weights and their version to the engine."""
        await self.engine.load(weights, version)

    async def reset(self) -> None:
        """Have the engine drop its KV; weights stay."""
        await self.engine.reset()

    async def sleep(self) -> None:
        """Have the engine give its memory back, where it has that feature."""
        await cast(SleepingEngine, self.engine).sleep()

    def counters(self) -> Mapping[str, int]:
        """The engine's counters."""
        return self.engine.counters()

    def close(self) -> None:
        """End what belongs to the engine."""
        self.engine.close()
