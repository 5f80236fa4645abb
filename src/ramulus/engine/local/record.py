"""What was sampled, step by step; a row's tokens are read out of it once, when somebody wants them."""

from __future__ import annotations

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

    def sampled(self, row: Row) -> list[int]:
        """The tokens of a row."""
        first, now = self.first, self.now
        if not row.spans:
            return self.tokens[row.since - first : now - first, row.place].tolist()
        whole: list[int] = []
        for place, a, b in (*row.spans, (row.place, row.since, now)):
            whole += self.tokens[a - first : b - first, place].tolist()
        return whole

    def columns(self, row: Row) -> list[list[float]]:
        """Log-probs, entropies, kept mass and temperatures of its tokens."""
        if not row.plain:
            return self._read(row, len(NUMBERS))
        columns = self._read(row, 2)
        n, temperature = len(columns[0]), row.setting[0]
        return [*columns, [0.0] * n, [float(temperature)] * n]  # type: ignore[arg-type]

    def _read(self, row: Row, count: int) -> list[list[float]]:
        first, now = self.first, self.now
        if not row.spans:
            return self.numbers[:count, row.since - first : now - first, row.place].tolist()  # type: ignore[no-any-return]
        whole: list[list[float]] = [[] for _ in range(count)]
        for place, a, b in (*row.spans, (row.place, row.since, now)):
            for column, more in zip(whole, self.numbers[:count, a - first : b - first, place].tolist(), strict=True):
                column += more
        return whole
