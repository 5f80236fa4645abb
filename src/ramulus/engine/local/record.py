"""What was sampled, step by step; a row's tokens are read out of it once, when somebody wants them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from ramulus.engine.local.rows import Row
from ramulus.engine.local.sampling import Drawn

STEPS = 256  # that there is room for at first
NUMBERS = ("logprobs", "entropy", "kept", "temperature")


class Record:
    """The draws of the last steps by place in the crowd; rows know in which place they sat during which of them.

    tokens [steps, most] and numbers [4, steps, most] (log-probs, entropies, kept mass, temperatures; the last two only of rows that are not
    plain); `most` rows at once, and the steps are those from `first` on. One is kept as long as some row that was in it, or in an earlier one,
    has not ended: what the longest row needs.
    """

    def __init__(self, most: int) -> None:
        self.first = self.now = 0  # the first step that is there, and the next one
        self.tokens = np.empty((STEPS, most), dtype=np.int64)
        self.numbers = np.empty((len(NUMBERS), STEPS, most))

    def room(self, steps: int, rows: Iterable[Row | None]) -> int:
        """Make room for so many steps more; returns where the next one goes."""
        size = len(self.tokens)
        if self.now - self.first + steps > size:
            needed = min((row.began for row in rows if row is not None), default=self.now)
            held = self.now - needed
            if held + steps > size // 2:
                size = 2 * (held + steps)
            tokens = np.empty((size, self.tokens.shape[1]), dtype=np.int64)
            numbers = np.empty((len(NUMBERS), size, self.tokens.shape[1]))
            tokens[:held] = self.tokens[needed - self.first : self.now - self.first]
            numbers[:, :held] = self.numbers[:, needed - self.first : self.now - self.first]
            self.tokens, self.numbers, self.first = tokens, numbers, needed
        return self.now - self.first

    def add(self, drawn: Drawn, rows: Iterable[Row | None]) -> None:
        """One step of the rows in the first places."""
        at, n = self.room(1, rows), len(drawn.tokens)
        self.tokens[at, :n] = drawn.tokens
        for i, name in enumerate(NUMBERS):
            self.numbers[i, at, :n] = getattr(drawn, name)
        self.now += 1

    def sampled(self, row: Row) -> array[int]:
        """The tokens of a row."""
        spans = [self.tokens[a - self.first : b - self.first, place] for place, a, b in row.sat(self.now)]
        return array("i", np.concatenate(spans, dtype=np.int32).tobytes())

    def columns(self, row: Row) -> list[array[float]]:
        """Log-probs and entropies of its tokens; of a row that is not plain also kept mass and temperatures."""
        count = 2 if row.plain else len(NUMBERS)
        spans = [self.numbers[:count, a - self.first : b - self.first, place] for place, a, b in row.sat(self.now)]
        return [array("f", column.tobytes()) for column in np.concatenate(spans, axis=1, dtype=np.float32)]
