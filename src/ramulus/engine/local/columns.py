"""The active rows as columns, one place each: what a decode step reads, changed only where somebody comes or goes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from ramulus.engine.engine import Segment
from ramulus.engine.local.rows import Row

TOKEN, POSITION, SLOT, STREAM, COUNT, LEFT = range(6)


class Columns:
    """state [6, most] int64: of the row in each place the next token to run and its position, its slot, its stream of random numbers (uint64 in
    int64), how many of them it has used, and how many tokens it still wants; heat [most] float32, its temperature where that is a number.
    """

    def __init__(self, most: int, vocabulary: int) -> None:
        self.state = np.zeros((6, most), dtype=np.int64)
        self.heat = np.ones(most, dtype=np.float32)
        self.vocabulary = vocabulary
        self.clear([])

    def clear(self, rows: list[Row | None]) -> None:
        """Nobody is there; `rows` is the list that the crowd is kept in."""
        self.rows = rows
        self.special = 0  # rows with a temperature rule or truncation
        self.asking: dict[Row, None] = {}  # those whose `until` wants to see every token
        self.futures: dict[asyncio.Future[list[Segment]], int] = {}  # of each group, how many of its rows are there
        self.known: frozenset[int] = frozenset()  # tokens that end some row, since the crowd was last empty
        self.ends: np.ndarray | None = None  # [vocabulary] 1 for those; None where there are none

    @property
    def n(self) -> int:
        """Rows in the crowd, holes included."""
        return len(self.rows)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Rows that went from one place to another."""
        for source, target in moves:
            self.state[:, target] = self.state[:, source]
            self.heat[target] = self.heat[source]

    def join(self, rows: Sequence[Row]) -> None:
        """Rows that have sat down, with their KV in place."""
        if not rows:
            return
        places = [row.place for row in rows]
        told = [(row.prefix[-1], len(row.text), row.slot, signed(row.stream), 0, row.most) for row in rows]
        self.state[:, places] = np.array(told, dtype=np.int64).T
        self.heat[places] = [float(row.setting[0]) if row.plain else 1.0 for row in rows]  # type: ignore[arg-type]
        ends = self.known
        for row in rows:
            self.special += not row.plain
            if row.until is not None:
                self.asking[row] = None
            if not row.ids <= ends:
                ends |= row.ids
            future = row.ticket.group.future
            self.futures[future] = self.futures.get(future, 0) + 1
        if ends != self.known:
            self.known, self.ends = ends, np.zeros(self.vocabulary, dtype=np.uint8)
            self.ends[[token for token in ends if 0 <= token < self.vocabulary]] = 1

    def leave(self, row: Row) -> None:
        """A row that has ended."""
        self.special -= not row.plain
        self.asking.pop(row, None)
        future = row.ticket.group.future
        self.futures[future] -= 1
        if not self.futures[future]:
            del self.futures[future]

    def seats(self) -> None:
        """The slots have other numbers."""
        self.state[SLOT, : self.n] = [-1 if row is None else row.slot for row in self.rows]

    def ended(self, tokens: np.ndarray) -> list[int]:
        """Places whose rows have all their tokens, or whose token of `tokens` [n] ends some row's text."""
        over = self.state[LEFT, : self.n] <= 0
        if self.ends is not None:
            over |= self.ends[tokens].view(bool)
        return np.flatnonzero(over).tolist()  # type: ignore[no-any-return]


def signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word
