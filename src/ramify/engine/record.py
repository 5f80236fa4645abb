"""What was sampled, block by block; a row's tokens are read out of it once, when somebody wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ramify.engine.rows import Row
from ramify.engine.sampling import Drawn

COLUMNS = ("logprobs", "kept", "entropy", "temperature")
SPARE = 256  # blocks that may lie about before they are dropped


@dataclass(slots=True)
class Block:
    """What a crowd of A rows drew in some steps, in which nobody came or went: lists [A][steps]."""

    steps: int
    tokens: list[list[int]]
    logprobs: list[list[float]]
    kept: list[list[float]]
    entropy: list[list[float]]
    temperature: list[list[float]]

    @classmethod
    def of(cls, drawn: Drawn) -> Block:
        """One step."""
        columns = (drawn.tokens, drawn.logprobs, drawn.kept, drawn.entropy, drawn.temperature)
        return cls(1, *([[x] for x in column] for column in columns))  # type: ignore[arg-type]


class Record:
    """The draws of all blocks from `first` on; rows know in which place they sat during which of them.

    A block is kept as long as some row that was in it, or in an earlier one, has not ended: what the longest row needs.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.first = 0
        self.since = 0  # the blocks before it are in the rows' spans
        self.steps = 0  # of those after it

    @property
    def now(self) -> int:
        """The number of the next block."""
        return self.first + len(self.blocks)

    def add(self, block: Block) -> None:
        """Keep what was drawn."""
        self.blocks.append(block)
        self.steps += block.steps

    def flush(self, rows: Sequence[Row | None]) -> None:
        """Tell the rows of the blocks since the last time; to be called before any of them moves, leaves or is joined."""
        now = self.now
        if now > self.since:
            for row in rows:
                if row is not None:
                    row.sat(self.since, now, self.steps)
        self.since, self.steps = now, 0

    def trim(self, rows: Sequence[Row | None]) -> None:
        """Drop the blocks that no row was in."""
        needed = min((row.spans[0][1] for row in rows if row is not None and row.spans), default=self.since)
        if needed - self.first > SPARE:
            del self.blocks[: needed - self.first]
            self.first = needed

    def tokens(self, row: Row) -> list[int]:
        """What the row has sampled, up to the last flush."""
        return self._column(row, "tokens")

    def last(self, row: Row) -> int:
        """The last of them, or of the prefix."""
        if not row.spans:
            return row.prefix[-1]
        place, _, stop = row.spans[-1]
        return self.blocks[stop - 1 - self.first].tokens[place][-1]

    def columns(self, row: Row) -> tuple[list[float], list[float], list[float], list[float]]:
        """Log-probs, kept mass, entropies and temperatures of its tokens."""
        logprobs, kept, entropy, temperature = (self._column(row, name) for name in COLUMNS)
        return logprobs, kept, entropy, temperature

    def _column(self, row: Row, name: str) -> list[Any]:
        first, spans = self.first, row.spans
        if len(spans) == 1 and spans[0][2] - spans[0][1] == 1:
            return getattr(self.blocks[spans[0][1] - first], name)[spans[0][0]]  # type: ignore[no-any-return]  # a list of the row's own
        whole: list[Any] = []
        for place, a, b in spans:
            for block in self.blocks[a - first : b - first]:
                whole += getattr(block, name)[place]
        return whole
