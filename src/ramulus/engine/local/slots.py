"""Slots of KV: how many fit into memory, and which sequence has which."""

from __future__ import annotations

from typing import Protocol

from ramulus.engine.engine import Request
from ramulus.engine.local.batch import Batch
from ramulus.engine.local.kv import ROUND, Copying, Geometry, Slots, rounded
from ramulus.engine.local.prefix_cache import Prefix, PrefixCache
from ramulus.engine.local.radix_tree import RadixTree
from ramulus.engine.local.sequence import Sequence

FOR_SLOTS = 0.75  # share of the memory that several slots may take; the radix tree has the rest
SPARE = 8  # slots in which prefixes of waiting sequences are prefilled beside those of newcomers, where the memory has room for them
POOL = 16  # most slots a row, where sequences take any: an ended one keeps its own as long as nobody needs it
ENOUGH = 4  # slots a row that are worth more than longer slots
AMPLE = 512  # tokens: beyond them POOL slots a row are worth more than longer ones


class SlotMemory:
    """The slots, the prefix cache over them, and how long slots must be so that `memory` bytes hold both.

    `most`: sequences at once. `capacity`: tokens that a slot must hold, since the last `forget`.
    """

    def __init__(self, geometry: Geometry, most: int, memory: int, kernels: Copying | None = None) -> None:
        self.geometry, self.most, self.memory = geometry, most, memory
        self.slots, self.tree = Slots(geometry, kernels), RadixTree(geometry.token_bytes)
        self.cache = PrefixCache(self.slots, self.tree)
        self.capacity = self.wanted = 0  # `wanted`: tokens that the longest request since the last `forget` needs

    @property
    def nbytes(self) -> int:
        """Bytes of KV held now, slots and remembered prefixes together; never above `memory`."""
        return self.slots.nbytes + self.tree.used

    def need(self, request: Request) -> int:
        """Tokens of a slot for this request."""
        return rounded(len(request.prefix) + request.sampling.max_tokens)

    def fit(self, capacity: int) -> int:
        """Slots of that capacity that the budget allows, at least one."""
        return max(1, int(self.memory * FOR_SLOTS) // (capacity * self.geometry.token_bytes))

    def room(self, capacity: int) -> int:
        """Sequences of that capacity that may run at once, at least one."""
        return min(self.most, self.fit(capacity))

    def admits(self, need: int, running: int, limit: int) -> bool:
        """Whether one more sequence can run beside that many; the capacity grows to what it needs, seldom and ahead where that costs no row."""
        capacity = max(self.capacity, need)
        if capacity > self.capacity:
            most = self.memory // self.geometry.token_bytes // ROUND * ROUND
            ahead = min(rounded(self.capacity * 3 // 2), rounded(limit), most)
            larger = [size for size in (self.wanted, ahead) if size > capacity and self.room(size) == self.room(capacity)]
            capacity = max([capacity, *larger])
        if running + 1 > self.room(capacity):
            return False
        self.capacity = capacity
        return True

    def shrink_tree(self, slots: int, capacity: int) -> None:
        """Leave the radix tree what so many slots of that capacity do not take."""
        self.tree.shrink(max(0, self.memory - slots * capacity * self.geometry.token_bytes))

    def forget(self) -> None:
        """Drop all KV; slots keep their memory for the next requests."""
        self.tree.clear()
        self.cache.clear()
        self.capacity = self.wanted = 0


class SlotAllocator(Protocol):
    """Gives sequences slots. A slot keeps its text, for all that go on from it, until another sequence takes it."""

    memory: SlotMemory

    def assign(self, newcomers: list[Sequence], batch: Batch, now: int) -> None:
        """Give each newcomer a slot and a row, from the step `now` on, and leave no hole in the batch."""
        ...

    def release(self, sequence: Sequence, text: Prefix) -> None:
        """A sequence has ended and left this text in its slot."""
        ...

    def abandon(self, batch: Batch) -> None:
        """All running sequences end where they are."""
        ...

    def forget(self) -> None:
        """Drop all KV; slots keep their memory for the next requests. Nothing runs."""
        ...

    @property
    def spare_bytes(self) -> int:
        """Bytes of prefixes that can be remembered without dropping any."""
        ...

    def early(self, count: int) -> list[int]:
        """At most so many slots in which prefixes of waiting sequences may be prefilled, until `give_back`."""
        ...

    def give_back(self, sequences: list[Sequence]) -> None:
        """Sequences whose prefixes were prefilled early wait on, without a slot."""
        ...

    def prefilled(self, sequence: Sequence) -> None:
        """The sequence's text, computed just now, lies in its slot: remember it."""
        ...


class AlignedSlots:
    """The sequence in row i of the batch has slot i, so that the slots of all are one block of memory, which torch's attention reads in place."""

    def __init__(self, memory: SlotMemory) -> None:
        self.memory, self.slots, self.cache = memory, memory.slots, memory.cache

    def assign(self, newcomers: list[Sequence], batch: Batch, now: int) -> None:
        """Each goes where its parent has left a hole, else into another hole, else to the end."""

        def moved(sequence: Sequence, row: int) -> None:
            self.cache.move(sequence.slot, row, len(sequence.text) + now - sequence.began)
            sequence.slot = row

        count = self._count() if newcomers else 0
        if newcomers and (count, self.memory.capacity) != (self.slots.rows, self.slots.capacity):
            batch.compact(now, moved)
            self._resize(count, batch.n)
        holes = dict.fromkeys(batch.holes())
        for sequence in newcomers:
            slot = self.cache.slot_of.get(sequence.text, -1) if holes else -1
            if slot in holes:
                del holes[slot]
                self.cache.evict(slot, stays=sequence.text)
                sequence.length = sequence.known = len(sequence.text)
                sequence.slot = slot
                batch.put(sequence, slot, now)
        free = iter(holes)
        for sequence in newcomers:
            if sequence.slot < 0:
                sequence.slot = next(free, batch.n)
                self.cache.evict(sequence.slot)
                batch.put(sequence, sequence.slot, now)
        batch.compact(now, moved)

    def _count(self) -> int:
        """Slots to make: those for running sequences, and the spare ones if both fit."""
        memory = self.memory
        room, size = memory.room(memory.capacity), memory.capacity * memory.geometry.token_bytes
        return room + SPARE if room == memory.most and (room + SPARE) * size <= memory.memory * FOR_SLOTS else room

    def _resize(self, count: int, running: int) -> None:
        """Make so many slots of the capacity; ended sequences keep theirs where there are no fewer."""
        for slot in range(count, self.slots.rows):
            self.cache.evict(slot)
        stay = max(running, self.cache.end)
        self.memory.shrink_tree(count, self.memory.capacity)
        self.slots.resize(count, self.memory.capacity, stay)

    def release(self, sequence: Sequence, text: Prefix) -> None:
        """The sequence's KV stays in its slot, under this text in the prefix cache, until a newcomer takes the slot."""
        self.cache.keep(sequence.slot, text)

    def abandon(self, batch: Batch) -> None:
        """Nothing to free: slots belong to rows, and the prefix cache keeps only what it holds of the ended sequences."""

    def forget(self) -> None:
        """Drop all KV."""
        self.memory.forget()

    @property
    def spare_bytes(self) -> int:
        """Bytes that the radix tree has left."""
        return self.memory.tree.budget - self.memory.tree.used

    def early(self, count: int) -> list[int]:
        """At most `count` slots beyond those that rows can have."""
        return list(range(self.memory.room(self.memory.capacity), self.slots.rows))[:count]

    def give_back(self, sequences: list[Sequence]) -> None:
        """They wait without a slot; what was prefilled for them is in the radix tree."""
        for sequence in sequences:
            sequence.wait()

    def prefilled(self, sequence: Sequence) -> None:
        """Copy the KV of the sequence's text from its slot into the radix tree."""
        self.memory.tree.insert(sequence.text, lambda start, stop: self.slots.get(sequence.slot, start, stop))


class PooledSlots:
    """Sequences take any slot: that unused for longest, so that ended ones keep theirs for as long as possible.

    For kernels alone, which take the slots where they are. The slots are made as long, from the start, as leaves ENOUGH of them, and POOL where
    they are AMPLE, so that they grow seldom; their shape depends on the requests since the last `forget` alone.
    """

    def __init__(self, memory: SlotMemory, limit: int) -> None:
        self.memory, self.slots, self.cache = memory, memory.slots, memory.cache
        self.idle: dict[int, None] = {}  # slots without a sequence, the longest unused first
        most = int(memory.memory * FOR_SLOTS) // (memory.most * memory.geometry.token_bytes)  # tokens, were there one slot a row
        ample = max(min(most // ENOUGH, AMPLE), most // POOL)
        self.ample = min(rounded(limit), max(ample // ROUND * ROUND, ROUND))

    def assign(self, newcomers: list[Sequence], batch: Batch, now: int) -> None:
        """Each takes the first hole of the batch, else the row after the last."""
        if newcomers:
            self._fit_slots(batch, now)
        for sequence in newcomers:  # what they go on from is used now
            parent = self.cache.slot_of.get(sequence.text, -1)
            if parent in self.idle:
                del self.idle[parent]
                self.idle[parent] = None
        holes = iter(batch.holes() if newcomers else ())
        for sequence in newcomers:
            sequence.slot = self._take(sequence)
            batch.put(sequence, next(holes, batch.n), now)
        batch.compact(now)

    def _take(self, sequence: Sequence) -> int:
        """The slot that its parent has left, unless more than the parent's text would be lost; else that unused for longest."""
        text, oldest = sequence.text, next(iter(self.idle))
        slot = self.cache.slot_of.get(text, -1)
        if slot in self.idle and (slot == oldest or self.cache.unsaved.get(slot, text) == text):
            self.cache.evict(slot, stays=text)
            sequence.length = sequence.known = len(text)
        else:
            slot = oldest
            self.cache.evict(slot)
        del self.idle[slot]
        return slot

    def _fit_slots(self, batch: Batch, now: int) -> None:
        """Make slots anew where these are too short, or of another shape than they would have been without what came before the last `forget`."""
        memory, running = self.memory, batch.running
        in_use = bool(self.cache.slot_of) or bool(running)
        capacity = max(self.slots.capacity if in_use else self.ample, memory.capacity)
        count = max(memory.room(capacity), min(POOL * memory.most, memory.fit(capacity)))
        if (count, capacity) != (self.slots.rows, self.slots.capacity):
            self._renew(count, capacity, running, now)

    def _renew(self, count: int, capacity: int, running: list[Sequence], now: int) -> None:
        """Make so many slots of that capacity, for the sequences that run and for the texts used last; all slots get new numbers."""
        texts = self.cache.texts
        remembered = [slot for slot in reversed(self.idle) if texts.get(slot)]  # the last used first
        stay, go = remembered[: count - len(running)], remembered[count - len(running) :]
        for slot in go:
            self.cache.evict(slot)
        self.memory.shrink_tree(count, capacity)
        lengths = {sequence.slot: len(sequence.text) + now - sequence.began for sequence in running}
        lengths |= {slot: max(map(len, texts[slot])) for slot in stay}
        self.slots.renew(count, capacity, list(lengths.items()))
        number = {slot: i for i, slot in enumerate(lengths)}
        self.cache.rename(number)
        for sequence in running:
            sequence.slot = number[sequence.slot]
        self.idle = dict.fromkeys([*range(len(lengths), count), *(number[slot] for slot in reversed(stay))])

    def release(self, sequence: Sequence, text: Prefix) -> None:
        """The sequence's KV stays in its slot, under this text in the prefix cache, until the slot is the one unused for longest."""
        self.cache.keep(sequence.slot, text)
        self.idle[sequence.slot] = None

    def abandon(self, batch: Batch) -> None:
        """Free the slots of all running sequences."""
        self.idle |= dict.fromkeys(sequence.slot for sequence in batch.running)

    def forget(self) -> None:
        """Drop all KV: every slot is free."""
        self.memory.forget()
        self.idle = dict.fromkeys(range(self.slots.rows))

    @property
    def spare_bytes(self) -> int:
        """Bytes of all slots: prefixes are remembered in them, without a copy."""
        return self.slots.nbytes

    def early(self, count: int) -> list[int]:
        """The slots unused for longest, at most `count` and SPARE; none where fewer than 2 x SPARE are free."""
        free = list(self.idle)[: min(count, SPARE)] if len(self.idle) >= 2 * SPARE else []
        for slot in free:
            self.cache.evict(slot)
            del self.idle[slot]
        return free

    def give_back(self, sequences: list[Sequence]) -> None:
        """They wait without a slot; a prefix that was prefilled whole stays in its slot."""
        for sequence in sequences:
            if sequence.length == len(sequence.text):
                self.cache.hold(sequence.slot, sequence.text)
            self.idle[sequence.slot] = None
            sequence.wait()

    def prefilled(self, sequence: Sequence) -> None:
        """Remember that the sequence's text lies in its slot."""
        self.cache.keep(sequence.slot, sequence.text)
