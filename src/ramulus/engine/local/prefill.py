"""Prefixes into KV: copied where they are remembered, prefilled where not, each distinct prefix once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ramulus.engine.local.forward import Forward
from ramulus.engine.local.kv import Reach, rounded
from ramulus.engine.local.radix_tree import common
from ramulus.engine.local.sequence import Sequence
from ramulus.engine.local.slots import SlotAllocator

PIECE = 2048  # padded tokens of one prefill pass
SHARED = 32  # tokens that two waiting prefixes must share before one of them waits for the other's prefill


class Prefill:
    """Fills the slots of newcomers with the KV of their prefixes, all but the last token, which the next decode step runs."""

    def __init__(self, forward: Forward, allocator: SlotAllocator, counters: dict[str, int]) -> None:
        self.forward, self.allocator, self.counters = forward, allocator, counters
        self.slots, self.tree, self.cache = allocator.memory.slots, allocator.memory.tree, allocator.memory.cache

    def start(self, newcomers: list[Sequence], waiting: Callable[[], list[Sequence]]) -> list[Sequence]:
        """Bring the prefix of each newcomer, but for its last token, into its slot: copied where remembered, else prefilled.

        Where a pass is needed anyway, it takes along what is missing of the prefixes of `waiting()`, sequences in spare slots, which are returned.
        """
        pending, moves = [], []
        for sequence in newcomers:
            if sequence.length < len(sequence.text):  # else it goes on in its parent's slot, or has nothing to copy
                moves += self._copy(sequence)
            if sequence.length < len(sequence.text):
                pending.append(sequence)
            else:
                self.cache.hold(sequence.slot, sequence.text)
            self.counters["reused"] += max(0, sequence.length - sequence.early)
        self.slots.move(moves)
        self.counters["prefilled"] += len(newcomers)  # the last token of each, by the next step
        spare = waiting() if pending else []
        early, left = self._missing(spare, pending), pending
        while left:
            left, early = self._wave(left, early), []
        for sequence in pending:
            self.cache.hold(sequence.slot, sequence.text)
        return spare

    def _copy(self, sequence: Sequence) -> list[tuple[int, int, int]]:
        """Bring what is remembered of the sequence's text into its slot: from the radix tree, or by what the slots are told to copy."""
        slot, n = self.cache.find(sequence.text)
        sequence.length, sequence.known = n, max(sequence.known, n)
        if n < len(sequence.text) and self.tree.root.children:
            pieces, held, known = self.tree.match(sequence.text)
            sequence.known = max(sequence.known, known)
            if held > n:
                sequence.length = held
                self.slots.put(sequence.slot, pieces)
                return []
        return [(slot, sequence.slot, n)] if n else []

    def _missing(self, sequences: list[Sequence], pending: list[Sequence]) -> list[Sequence]:
        """The waiting sequences whose prefixes are not remembered yet; none unless all can be without dropping anything."""
        self.slots.move([move for sequence in sequences for move in self._copy(sequence)])
        sequences = [sequence for sequence in sequences if sequence.length < len(sequence.text)]
        size = sum(len(sequence.prefix) for sequence in pending + sequences) * self.tree.token_bytes
        return sequences if size <= self.allocator.spare_bytes else []

    def _wave(self, pending: list[Sequence], early: list[Sequence]) -> list[Sequence]:
        """Prefill each distinct prefix once; those that share a good part, or are the beginning of another, copy it afterwards. Returns who is
        not done yet."""
        leaders: dict[tuple[int, ...], Sequence] = {}
        followers: list[tuple[Sequence, Sequence]] = []
        for sequence in pending:
            leader = leaders.setdefault(_opening(sequence), sequence)
            if leader is not sequence:
                followers.append((sequence, leader))
        for sequence in early:
            leaders.setdefault(_opening(sequence), sequence)
        longest = _longest(list(leaders.values()))
        alone = [sequence for sequence in leaders.values() if longest[sequence] is sequence]
        followers = [(sequence, longest[leader]) for sequence, leader in followers]
        followers += [(sequence, longest[sequence]) for sequence in pending if longest.get(sequence, sequence) is not sequence]
        self._prefill(alone)
        for sequence in alone:
            self.allocator.prefilled(sequence)
        shared = [common(sequence.text, leader.text) for sequence, leader in followers]
        self.slots.move([(leader.slot, sequence.slot, n) for (sequence, leader), n in zip(followers, shared, strict=True)])
        for (sequence, _), n in zip(followers, shared, strict=True):
            self.counters["reused"] += n - sequence.length
            sequence.length = n
        return [sequence for sequence, _ in followers if sequence.length < len(sequence.text)]

    def _prefill(self, sequences: list[Sequence]) -> None:
        """Run what is missing of the prefixes, sequences of like length together, in passes of at most PIECE padded tokens."""
        todo = sorted(sequences, key=lambda sequence: len(sequence.prefix) - sequence.length)
        for sequence in sequences:
            missing = len(sequence.text) - sequence.length
            sequence.early += missing
            self.counters["prefilled"] += missing
            self.counters["prefilled_again"] += max(0, min(sequence.known - sequence.length, missing))
        while todo:
            count = 1
            while count < len(todo) and (count + 1) * (len(todo[count].text) - todo[count].length) <= PIECE:
                count += 1
            self._pass(todo[:count])
            todo = [sequence for sequence in todo if sequence.length < len(sequence.text)]

    def _pass(self, sequences: list[Sequence]) -> None:
        sizes = [min(len(sequence.text) - sequence.length, PIECE) for sequence in sequences]
        n, device = max(sizes), self.slots.geometry.device
        self.counters["passes"] += 1
        tokens = np.zeros((len(sequences), n), dtype=np.int64)
        for line, sequence, size in zip(tokens, sequences, sizes):
            line[:size] = sequence.prefix[sequence.length : sequence.length + size]
        starts = torch.tensor([sequence.length for sequence in sequences], device=device)[:, None]
        offset = torch.arange(n, device=device)[None]
        length = torch.tensor(sizes, device=device)[:, None]
        positions = starts + torch.minimum(offset, length - 1)
        valid = None if min(sizes) == n else offset < length
        reach = min(self.slots.capacity, rounded(max(sequence.length + size for sequence, size in zip(sequences, sizes))))
        slot_numbers = torch.tensor([sequence.slot for sequence in sequences], device=device)
        self.forward(torch.from_numpy(tokens).to(device), positions, Reach(self.slots, positions, reach, slot_numbers, valid), False)
        for sequence, size in zip(sequences, sizes):
            sequence.length += size


def _longest(sequences: list[Sequence]) -> dict[Sequence, Sequence]:
    """Of each sequence, one whose prefix goes on from its own, and that no other goes on from; itself without one. Forks of one path, say."""
    longest: dict[Sequence, Sequence] = {}
    last: Sequence | None = None
    for sequence in sorted(sequences, key=lambda sequence: sequence.text, reverse=True):  # what begins alike stands together, the longest first
        mine = sequence.text
        last = last if last is not None and last.prefix[: len(mine)] == mine else sequence
        longest[sequence] = last
    return longest


def _opening(sequence: Sequence) -> tuple[int, ...]:
    """What two sequences must have in common for one to wait for the other's prefill: SHARED tokens beyond what is there, or all."""
    return sequence.text[: sequence.length + SHARED]
