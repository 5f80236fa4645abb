"""Prefixes into KV: copied where they are remembered, prefilled where not, each distinct prefix once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ramulus.engine.local.forward import Forward
from ramulus.engine.local.kv import Reach, rounded
from ramulus.engine.local.radix import common
from ramulus.engine.local.rows import Row
from ramulus.engine.local.seating import Seating

PIECE = 2048  # padded tokens of one prefill pass
SHARED = 32  # tokens that two waiting prefixes must share before one of them waits for the other's prefill


class Prefill:
    """Fills the slots of newcomers with the KV of their prefixes, all but the last token, which the next decode step runs."""

    def __init__(self, forward: Forward, seating: Seating, counters: dict[str, int]) -> None:
        self.forward, self.seating, self.counters = forward, seating, counters
        self.slots, self.trie, self.residents = seating.slots, seating.trie, seating.residents

    def start(self, seated: list[Row], waiting: Callable[[], list[Row]]) -> list[Row]:
        """Bring the prefix of each newcomer, but for its last token, into its slot: copied where remembered, else prefilled.

        Where a pass is needed anyway, it takes along what is missing of the prefixes of `waiting()`, rows in spare slots, which are returned.
        """
        pending, moves = [], []
        for row in seated:
            if row.length < len(row.text):  # else it goes on in its parent's slot, or has nothing to copy
                moves += self._copy(row)
            if row.length < len(row.text):
                pending.append(row)
            else:
                self.residents.hold(row.slot, row.text)
            self.counters["reused"] += max(0, row.length - row.ticket.early)
        self.slots.move(moves)
        self.counters["prefilled"] += len(seated)  # the last token of each, by the next step
        spare = waiting() if pending else []
        early, left = self._missing(spare, pending), pending
        while left:
            left, early = self._wave(left, early), []
        for row in pending:
            self.residents.hold(row.slot, row.text)
        return spare

    def _copy(self, row: Row) -> list[tuple[int, int, int]]:
        """Bring what is remembered of the row's text into its slot: from the trie, or by what the slots are told to copy."""
        slot, n = self.residents.find(row.text)
        row.length, row.known = n, max(row.known, n)
        if n < len(row.text) and self.trie.root.children:
            found, held, known = self.trie.match(row.text)
            row.known = max(row.known, known)
            if held > n:
                row.length = held
                self.slots.put(row.slot, found)
                return []
        return [(slot, row.slot, n)] if n else []

    def _missing(self, rows: list[Row], pending: list[Row]) -> list[Row]:
        """Those of the waiting rows that are not remembered yet; none unless all can be without dropping anything."""
        self.slots.move([move for row in rows for move in self._copy(row)])
        rows = [row for row in rows if row.length < len(row.text)]
        size = sum(len(row.prefix) for row in pending + rows) * self.trie.token_bytes
        return rows if size <= self.seating.spare_bytes else []

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
            self.seating.prefilled(row)
        shared = [common(row.text, leader.text) for row, leader in followers]
        self.slots.move([(leader.slot, row.slot, n) for (row, leader), n in zip(followers, shared, strict=True)])
        for (row, _), n in zip(followers, shared, strict=True):
            self.counters["reused"] += n - row.length
            row.length = n
        return [row for row, _ in followers if row.length < len(row.text)]

    def _prefill(self, rows: list[Row]) -> None:
        """Run what is missing of the prefixes, rows of like length together, in passes of at most PIECE padded tokens."""
        todo = sorted(rows, key=lambda row: len(row.prefix) - row.length)
        for row in rows:
            missing = len(row.text) - row.length
            row.ticket.early += missing
            self.counters["prefilled"] += missing
            self.counters["prefilled_again"] += max(0, min(row.known - row.length, missing))
        while todo:
            count = 1
            while count < len(todo) and (count + 1) * (len(todo[count].text) - todo[count].length) <= PIECE:
                count += 1
            self._pass(todo[:count])
            todo = [row for row in todo if row.length < len(row.text)]

    def _pass(self, rows: list[Row]) -> None:
        sizes = [min(len(row.text) - row.length, PIECE) for row in rows]
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


def _longest(rows: list[Row]) -> dict[Row, Row]:
    """Of each row, one whose prefix goes on from its own, and that no other goes on from; itself without one. Forks of one path, say."""
    found: dict[Row, Row] = {}
    last: Row | None = None
    for row in sorted(rows, key=lambda row: row.text, reverse=True):  # what begins alike stands together, the longest first
        mine = row.text
        last = last if last is not None and last.prefix[: len(mine)] == mine else row
        found[row] = last
    return found


def _opening(row: Row) -> tuple[int, ...]:
    """What two rows must have in common for one to wait for the other's prefill: SHARED tokens beyond what is there, or all."""
    return row.text[: row.length + SHARED]
