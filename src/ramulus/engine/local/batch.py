"""The running sequences, one row each, and what a decode step reads of them; changed only where a sequence joins, moves or leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from ramulus.engine.engine import Segment
from ramulus.engine.local.sequence import Sequence

TOKEN, POSITION, SLOT, STREAM, COUNT, LEFT = range(6)


class Batch:
    """Rows 0..n-1, None where a sequence has left and no other has come yet.

    state [6, most] int64: of the sequence in each row the next token to run and its position, its slot, its stream of random numbers (uint64 in
    int64), how many of them it has used, and how many tokens it still wants; temperature [most] float32, where that is a number.
    """

    def __init__(self, most: int, vocabulary: int) -> None:
        self.state = np.zeros((6, most), dtype=np.int64)
        self.temperature = np.ones(most, dtype=np.float32)
        self.vocabulary = vocabulary
        self.clear()

    def clear(self) -> None:
        """Empty the batch: all sequences leave."""
        self.rows: list[Sequence | None] = []
        self.begin()

    def begin(self) -> None:
        """No sequence runs: forget what was true of those that did."""
        self.special = 0  # sequences with a temperature rule or truncation
        self.asking: dict[Sequence, None] = {}  # those whose `until` wants to see every token
        self.futures: dict[asyncio.Future[list[Segment]], int] = {}  # of each group, how many of its sequences are here
        self.known: frozenset[int] = frozenset()  # tokens that end some sequence, since the batch was last empty
        self.ends: np.ndarray | None = None  # [vocabulary] 1 for those; None where there are none

    @property
    def n(self) -> int:
        """Rows, holes included."""
        return len(self.rows)

    @property
    def running(self) -> list[Sequence]:
        """The sequences in the order of their rows."""
        return [sequence for sequence in self.rows if sequence is not None]

    def holes(self) -> list[int]:
        """Rows that no sequence is in."""
        return [i for i, sequence in enumerate(self.rows) if sequence is None] if None in self.rows else []

    def put(self, sequence: Sequence, row: int, now: int) -> None:
        """Give a sequence a hole or the row after the last, from the step `now` on."""
        sequence.take_row(row, now)
        self.rows[row : row + 1] = [sequence]

    def compact(self, now: int, moved: Callable[[Sequence, int], None] | None = None) -> None:
        """Move the last sequences into the holes; `moved` is told of each before it takes its new row."""
        for hole in self.holes():
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if hole >= len(self.rows):
                return
            sequence = self.rows.pop()
            assert sequence is not None
            if moved is not None:
                moved(sequence, hole)
            self.state[:, hole] = self.state[:, sequence.row]
            self.temperature[hole] = self.temperature[sequence.row]
            sequence.take_row(hole, now)
            self.rows[hole] = sequence

    def join(self, sequences: list[Sequence]) -> None:
        """Sequences that have their rows, and their KV in place, begin."""
        if not sequences:
            return
        rows = [sequence.row for sequence in sequences]
        columns = [(s.prefix[-1], len(s.text), s.slot, signed(s.stream), 0, s.request.sampling.max_tokens) for s in sequences]
        self.state[:, rows] = np.array(columns, dtype=np.int64).T
        self.temperature[rows] = [float(s.setting[0]) if s.plain else 1.0 for s in sequences]  # type: ignore[arg-type]
        ends = self.known
        for sequence in sequences:
            self.special += not sequence.plain
            if sequence.until is not None:
                self.asking[sequence] = None
            if not sequence.ids <= ends:
                ends |= sequence.ids
            future = sequence.group.future
            self.futures[future] = self.futures.get(future, 0) + 1
        if ends != self.known:
            self.known, self.ends = ends, np.zeros(self.vocabulary, dtype=np.uint8)
            self.ends[[token for token in ends if 0 <= token < self.vocabulary]] = 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended: its row is a hole."""
        self.rows[sequence.row] = None
        self.special -= not sequence.plain
        self.asking.pop(sequence, None)
        future = sequence.group.future
        self.futures[future] -= 1
        if not self.futures[future]:
            del self.futures[future]

    def read_slots(self) -> None:
        """The slots of running sequences have other numbers."""
        self.state[SLOT, : self.n] = [-1 if sequence is None else sequence.slot for sequence in self.rows]

    def ended(self, tokens: np.ndarray) -> list[int]:
        """Rows whose sequences have all their tokens, or whose token of `tokens` [n] ends some sequence."""
        over = self.state[LEFT, : self.n] <= 0
        if self.ends is not None:
            over |= self.ends[tokens].view(bool)
        return np.flatnonzero(over).tolist()  # type: ignore[no-any-return]


def signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word
