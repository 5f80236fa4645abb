"""Prefixes into KV: copied where they are remembered, prefilled where not, each distinct prefix once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ramify.engine.forward import Forward
from ramify.engine.kv import Reach, Slots, rounded
from ramify.engine.radix import Trie, common
from ramify.engine.residents import Residents
from ramify.engine.rows import Row

PIECE = 2048  # padded tokens of one prefill pass
SHARED = 32  # tokens that two waiting prefixes must share before one of them waits for the other's prefill


class Prefill:
    """Fills the slots of newcomers with the KV of their prefixes, all but the last token, which the next decode step runs."""

    def __init__(
        self, forward: Forward, slots: Slots, trie: Trie, residents: Residents, counters: dict[str, int]
    ) -> None:
        self.forward, self.slots, self.trie, self.residents, self.counters = forward, slots, trie, residents, counters

    def start(self, seated: list[Row], waiting: Callable[[], list[Row]]) -> None:
        """Bring the prefix of each newcomer, but for its last token, into its slot: copied where remembered, else prefilled.

        Where a pass is needed anyway, it takes along what is missing of the prefixes of `waiting()`, rows in spare slots.
        """
        pending = []
        for row in seated:
            if row.length < len(row.prefix) - 1:  # else it goes on in its parent's slot, or has nothing to copy
                self._copy(row)
            if row.length < len(row.prefix) - 1:
                pending.append(row)
            else:
                self.residents.hold(row.slot, row.prefix[:-1])
            self.counters["reused"] += max(0, row.length - row.ticket.early)
        self.counters["prefilled"] += len(seated)  # the last token of each, by the next step
        early = self._missing(waiting(), pending) if pending else []
        left = pending
        while left:
            left, early = self._wave(left, early), []
        for row in pending:
            self.residents.hold(row.slot, row.prefix[:-1])

    def _copy(self, row: Row) -> None:
        """Copy what is remembered of the row's prefix into its slot."""
        text = row.prefix[:-1]
        source = self.residents.where.get(text)
        if source is not None:
            self.slots.move(source, row.slot, len(text))
            row.length = row.known = len(text)
            return
        found, row.length, row.known = self.trie.match(text)
        if row.length < len(text) and self.residents.keep():
            found, row.length, row.known = self.trie.match(text)
        self.slots.put(row.slot, found)

    def _missing(self, rows: list[Row], pending: list[Row]) -> list[Row]:
        """Those of the waiting rows that are not remembered yet; none unless all can be without dropping anything."""
        for row in rows:
            self._copy(row)
        rows = [row for row in rows if row.length < len(row.prefix) - 1]
        size = sum(len(row.prefix) for row in pending + rows) * self.trie.token_bytes
        return rows if size <= self.trie.budget - self.trie.used else []

    def _wave(self, pending: list[Row], early: list[Row]) -> list[Row]:
        """Prefill each distinct prefix once; those that share a good part, or are the beginning of another, copy it afterwards. Returns who is
        not done yet."""
        leaders: dict[tuple[int, ...], Row] = {}
        followers: list[tuple[Row, Row]] = []
        for row in pending:
            leader = leaders.setdefault(_opening(row), row)
            if leader is not row:
                followers.append((row, leader))
        for row in early:
            leaders.setdefault(_opening(row), row)
        longest = _longest(list(leaders.values()))
        alone = [row for row in leaders.values() if longest[row] is row]
        followers = [(row, longest[leader]) for row, leader in followers]
        followers += [(row, longest[row]) for row in pending if longest.get(row, row) is not row]
        self._prefill(alone)
        for row in alone:
            self.remember(row, row.prefix[:-1])
        for row, leader in followers:
            n = common(row.prefix[:-1], leader.prefix[:-1])
            self.slots.move(leader.slot, row.slot, n)
            self.counters["reused"] += n - row.length
            row.length = n
        return [row for row, _ in followers if row.length < len(row.prefix) - 1]

    def _prefill(self, rows: list[Row]) -> None:
        """Run what is missing of the prefixes, rows of like length together, in passes of at most PIECE padded tokens."""
        todo = sorted(rows, key=lambda row: len(row.prefix) - row.length)
        for row in rows:
            missing = len(row.prefix) - 1 - row.length
            row.ticket.early += missing
            self.counters["prefilled"] += missing
            self.counters["prefilled_again"] += max(0, min(row.known - row.length, missing))
        while todo:
            count = 1
            while count < len(todo) and (count + 1) * (len(todo[count].prefix) - 1 - todo[count].length) <= PIECE:
                count += 1
            self._pass(todo[:count])
            todo = [row for row in todo if row.length < len(row.prefix) - 1]

    def _pass(self, rows: list[Row]) -> None:
        sizes = [min(len(row.prefix) - 1 - row.length, PIECE) for row in rows]
        n, device = max(sizes), self.slots.geometry.device
        self.counters["passes"] += 1
        tokens = np.zeros((len(rows), n), dtype=np.int64)
        for line, row, size in zip(tokens, rows, sizes):
            line[:size] = row.prefix[row.length : row.length + size]
        starts = torch.tensor([row.length for row in rows], device=device)[:, None]
        offset = torch.arange(n, device=device)[None]
        length = torch.tensor(sizes, device=device)[:, None]
        positions = starts + torch.minimum(offset, length - 1)
        valid = None if min(sizes) == n else offset < length
        reach = min(self.slots.capacity, rounded(max(row.length + size for row, size in zip(rows, sizes))))
        seats = torch.tensor([row.slot for row in rows], device=device)
        self.forward(torch.from_numpy(tokens).to(device), positions, Reach(self.slots, positions, reach, seats, valid), False)
        for row, size in zip(rows, sizes):
            row.length += size

    def remember(self, row: Row, sequence: tuple[int, ...]) -> None:
        """Keep the KV of `sequence`, which lies in the row's slot, for later requests."""
        self.trie.insert(sequence, lambda start, stop: self.slots.get(row.slot, start, stop))


def _longest(rows: list[Row]) -> dict[Row, Row]:
    """Of each row, one whose prefix goes on from its own, and that no other goes on from; itself without one. Forks of one path, say."""
    found: dict[Row, Row] = {}
    last: Row | None = None
    for row in sorted(rows, key=lambda row: row.prefix[:-1], reverse=True):  # what begins alike stands together, the longest first
        mine = row.prefix[:-1]
        last = last if last is not None and last.prefix[: len(mine)] == mine else row
        found[row] = last
    return found


def _opening(row: Row) -> tuple[int, ...]:
    """What two rows must have in common for one to wait for the other's prefill: SHARED tokens beyond what is there, or all."""
    return row.prefix[:-1][: row.length + SHARED]
