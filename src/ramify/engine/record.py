"""What was sampled, step by step; a row's tokens are read out of it once, when somebody wants them."""

from __future__ import annotations

from collections.abc import Sequence

from ramify.engine.rows import Row
from ramify.engine.sampling import Drawn

SPARE = 256  # steps that may lie about before they are dropped


class Record:
    """The draws of all steps from `first` on; rows know in which slot they sat during which of them.

    A step is kept as long as some row that was in it, or in an earlier one, has not ended: what the longest row needs.
    """

    def __init__(self) -> None:
        self.steps: list[Drawn] = []
        self.first = 0
        self.since = 0  # the steps before it are in the rows' spans

    @property
    def now(self) -> int:
        """The number of the next step."""
        return self.first + len(self.steps)

    def flush(self, rows: Sequence[Row | None]) -> None:
        """Tell the rows of the steps since the last time; to be called before any of them moves, leaves or is joined."""
        count = self.now - self.since
        if count:
            for row in rows:
                if row is not None:
                    row.sat(self.since, count)
        self.since = self.now

    def trim(self, rows: Sequence[Row | None]) -> None:
        """Drop the steps that no row was in."""
        needed = min((row.spans[0][1] for row in rows if row is not None and row.spans), default=self.since)
        if needed - self.first > SPARE:
            del self.steps[: needed - self.first]
            self.first = needed

    def tokens(self, row: Row) -> list[int]:
        """What the row has sampled, up to the last flush."""
        return [self.steps[i].tokens[slot] for slot, a, b in row.spans for i in range(a - self.first, b - self.first)]

    def last(self, row: Row) -> int:
        """The last of them, or of the prefix."""
        if not row.spans:
            return row.prefix[-1]
        slot, _, stop = row.spans[-1]
        return self.steps[stop - 1 - self.first].tokens[slot]

    def columns(self, row: Row) -> tuple[list[float], list[float], list[float], list[float]]:
        """Log-probs, kept mass, entropies and temperatures of its tokens."""
        where = [(self.steps[i], slot) for slot, a, b in row.spans for i in range(a - self.first, b - self.first)]
        return (
            [step.logprobs[slot] for step, slot in where],
            [step.kept[slot] for step, slot in where],
            [step.entropy[slot] for step, slot in where],
            [step.temperature[slot] for step, slot in where],
        )
