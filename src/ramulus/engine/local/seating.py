"""Who sits where: the rows of the crowd, and the slots that hold their KV."""

from __future__ import annotations

from ramulus.engine.engine import Request
from ramulus.engine.local.kv import ROUND, Copying, Geometry, Slots, rounded
from ramulus.engine.local.radix import Trie
from ramulus.engine.local.residents import Residents
from ramulus.engine.local.rows import Row

FOR_SLOTS = 0.75  # share of the memory that several slots may take; the trie remembers in the rest
SPARE = 8  # slots in which prefixes of waiting requests are prefilled beside those of newcomers, where the memory has room for them
POOL = 16  # most slots a row, where a row can sit in any: those that have finished stay where they are as long as nobody needs the slot
ENOUGH = 4  # slots a row that are worth more than longer slots


class Seating:
    """Row i of the crowd has its KV in slot i, so that the slots of all are one block of memory; slots of finished rows stay until overwritten.

    `most`: rows at once. `memory`: bytes of KV, slots and trie together.
    """

    def __init__(self, geometry: Geometry, most: int, memory: int, kernels: Copying | None = None) -> None:
        self.geometry, self.most, self.memory = geometry, most, memory
        self.slots = Slots(geometry, kernels)
        self.trie = Trie(geometry.token_bytes)
        self.residents = Residents(self.slots, self.trie)
        self.rows: list[Row | None] = []  # None is a hole left by a finished row
        self.capacity = 0  # tokens that a slot must hold, since the last `forget`
        self.wanted = 0  # tokens that the longest request since then needs

    @property
    def active(self) -> int:
        """Rows that have not finished."""
        return sum(row is not None for row in self.rows)

    def need(self, request: Request) -> int:
        """Tokens of a slot for this request."""
        return rounded(len(request.prefix) + request.sampling.max_tokens)

    def room(self, capacity: int) -> int:
        """Rows of that capacity that the budget allows at once, at least one."""
        return min(self.most, self._fit(capacity))

    def _fit(self, capacity: int) -> int:
        return max(1, int(self.memory * FOR_SLOTS) // (capacity * self.geometry.token_bytes))

    def fits(self, need: int, rows: int, limit: int) -> bool:
        """Whether one more row can sit beside that many; the capacity grows to what it needs, seldom and ahead where that costs no row."""
        capacity = max(self.capacity, need)
        if capacity > self.capacity:
            most = self.memory // self.geometry.token_bytes // ROUND * ROUND
            ahead = min(rounded(self.capacity * 3 // 2), rounded(limit), most)
            larger = [size for size in (self.wanted, ahead) if size > capacity and self.room(size) == self.room(capacity)]
            capacity = max([capacity, *larger])
        if rows + 1 > self.room(capacity):
            return False
        self.capacity = capacity
        return True

    def forget(self) -> None:
        """Drop all KV; slots keep their memory for the next requests."""
        assert not self.rows
        self.trie.clear()
        self.residents.clear()
        self.capacity = self.wanted = 0

    def release(self) -> None:
        """Drop all KV and give its memory back."""
        self.slots.drop()
        self.forget()

    def seat(self, seated: list[Row], now: int) -> list[tuple[int, int]]:
        """Give each newcomer a slot and a place, from the step `now` on; returns the moves (from, to) that closed holes, in their order."""
        rows, moves = self._with_spare() if seated else 0, []
        if seated and (rows, self.capacity) != (self.slots.rows, self.slots.capacity):
            moves = self._close(now)
            self._resize(rows)
        holes = dict.fromkeys(i for i, row in enumerate(self.rows) if row is None) if None in self.rows else {}
        for row in seated:  # where its parent has left a hole, there, else in another hole, else at the end
            slot = self.residents.where.get(row.text, -1) if holes else -1
            if slot in holes:
                del holes[slot]
                self.residents.vacate(slot, stays=row.text)
                row.length = row.known = len(row.text)
                self._sit(row, slot, now)
        free = iter(holes)
        for row in seated:
            if row.slot < 0:
                slot = next(free, len(self.rows))
                self.residents.vacate(slot)
                self._sit(row, slot, now)
        return moves + self._close(now)

    def _with_spare(self) -> int:
        """Slots to make: those for active rows, and the spare ones if both fit."""
        room, size = self.room(self.capacity), self.capacity * self.geometry.token_bytes
        return room + SPARE if room == self.most and (room + SPARE) * size <= self.memory * FOR_SLOTS else room

    def _resize(self, rows: int) -> None:
        """Make so many slots of the capacity; finished rows keep theirs where there are no fewer."""
        for slot in range(rows, self.slots.rows):
            self.residents.vacate(slot)
        stay = max(len(self.rows), self.residents.end)
        self.trie.shrink(max(0, self.memory - rows * self.capacity * self.geometry.token_bytes))
        self.slots.resize(rows, self.capacity, stay)

    def _sit(self, row: Row, slot: int, now: int) -> None:
        row.slot = slot
        row.sit(slot, now)
        self.rows[slot : slot + 1] = [row]

    def _close(self, now: int) -> list[tuple[int, int]]:
        """Move the last rows into the holes."""
        moves = []
        for i in range(len(self.rows)) if None in self.rows else ():
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if i < len(self.rows) and self.rows[i] is None:
                row = self.rows.pop()
                assert row is not None
                moves.append((row.place, i))
                self._move(row, i, now)
                row.sit(i, now)
                self.rows[i] = row
        return moves

    def _move(self, row: Row, place: int, now: int) -> None:
        self.residents.move(row.slot, place, len(row.text) + now - row.began)
        row.slot = place

    @property
    def spare_bytes(self) -> int:
        """Bytes of prefixes that can be remembered without dropping any."""
        return self.trie.budget - self.trie.used

    def early(self, count: int) -> list[int]:
        """At most so many slots in which prefixes of waiting requests may be prefilled."""
        return list(range(self.room(self.capacity), self.slots.rows))[:count]

    def prefilled(self, row: Row) -> None:
        """The row's text, computed just now, lies in its slot: remember it."""
        self.trie.insert(row.text, lambda start, stop: self.slots.get(row.slot, start, stop))

    def leave(self, row: Row, text: tuple[int, ...]) -> None:
        """A row has ended and left this text in its slot."""
        self.residents.finish(row.slot, text)
        self.rows[row.place] = None

    def clear(self) -> None:
        """Send all rows away; what they left stays."""
        self.rows = []

    def went(self, rows: list[Row]) -> None:
        """The rows that were prefilled early have no slot any more."""


class Pool(Seating):
    """Rows sit in any slot, so that a finished row keeps its own, for all that go on from it, until none is free; the longest unused goes first.

    For kernels alone, which take the rows where they are. `capacity` is what slots must hold, `slots.capacity` what they can: from the start as
    much as leaves ENOUGH of them, so that they grow seldom. Their shape depends on the requests since the last `forget` alone.
    """

    def __init__(self, geometry: Geometry, most: int, memory: int, limit: int, kernels: Copying) -> None:
        self.idle: dict[int, None] = {}  # slots without a row, the longest unused first
        super().__init__(geometry, most, memory, kernels)
        ample = int(memory * FOR_SLOTS) // (ENOUGH * most * geometry.token_bytes)
        self.ample = min(rounded(limit), max(ample // ROUND * ROUND, ROUND))

    def forget(self) -> None:
        """Drop all KV; slots keep their memory for the next requests."""
        super().forget()
        self.idle = dict.fromkeys(range(self.slots.rows))

    def seat(self, seated: list[Row], now: int) -> list[tuple[int, int]]:
        """Give each newcomer a slot and a place, from the step `now` on; returns the moves (from, to) that closed holes, in their order."""
        if seated:
            self._fitting(now)
        for row in seated:  # what they go on from is used now
            self._use(self.residents.where.get(row.text, -1))
        holes = iter([i for i, row in enumerate(self.rows) if row is None] if None in self.rows and seated else ())
        for row in seated:
            row.slot = self._slot(row)
            place = next(holes, len(self.rows))
            row.sit(place, now)
            self.rows[place : place + 1] = [row]
        return self._close(now)

    def _slot(self, row: Row) -> int:
        """The slot that its parent has left, unless more than the parent's text would be lost; else that unused for longest."""
        slot, first = self.residents.where.get(row.text, -1), next(iter(self.idle))
        if slot in self.idle and (slot == first or self.residents.unkept.get(slot, row.text) == row.text):
            self.residents.vacate(slot, stays=row.text)
            row.length = row.known = len(row.text)
        else:
            slot = first
            self.residents.vacate(slot)
        del self.idle[slot]
        return slot

    def _use(self, slot: int) -> None:
        if slot in self.idle:
            del self.idle[slot]
            self.idle[slot] = None

    def _move(self, row: Row, place: int, now: int) -> None:
        """Only the place changes."""

    def _fitting(self, now: int) -> None:
        """Make slots anew where these are too short, or of another shape than they would have been without what came before the last `forget`."""
        held = bool(self.residents.where) or self.active > 0
        capacity = self.slots.capacity if held else self.ample
        if capacity < self.capacity:
            capacity = self.capacity
        count = max(self.room(capacity), min(POOL * self.most, self._fit(capacity)))
        if (count, capacity) != (self.slots.rows, self.slots.capacity):
            self._renew(count, capacity, now)

    def _renew(self, count: int, capacity: int, now: int) -> None:
        """Make so many slots of that capacity, for the rows there are and for the texts used last."""
        active = {row.slot: len(row.text) + now - row.began for row in self.rows if row is not None}
        held = [slot for slot in reversed(self.idle) if self.residents.texts.get(slot)]
        stay = held[: count - len(active)]
        for slot in held[count - len(active) :]:
            self.residents.vacate(slot)
        self.trie.shrink(max(0, self.memory - count * capacity * self.geometry.token_bytes))
        lengths = {slot: max(map(len, self.residents.texts[slot])) for slot in stay}
        kept = [*active.items(), *((slot, lengths[slot]) for slot in stay)]
        self.slots.renew(count, capacity, kept)
        names = {slot: i for i, (slot, _) in enumerate(kept)}
        self.residents.rename(names)
        for row in self.rows:
            if row is not None:
                row.slot = names[row.slot]
        self.idle = dict.fromkeys([*range(len(kept), count), *(names[slot] for slot in reversed(stay))])

    @property
    def spare_bytes(self) -> int:
        """Bytes of prefixes that can be remembered: they stay in their slots."""
        return self.slots.nbytes

    def early(self, count: int) -> list[int]:
        """At most so many slots in which prefixes of waiting requests may be prefilled."""
        found = list(self.idle)[: min(count, SPARE)] if len(self.idle) >= 2 * SPARE else []
        for slot in found:
            self.residents.vacate(slot)
            del self.idle[slot]
        return found

    def prefilled(self, row: Row) -> None:
        """The row's text, computed just now, lies in its slot: remember it."""
        self.residents.finish(row.slot, row.text)

    def leave(self, row: Row, text: tuple[int, ...]) -> None:
        """A row has ended and left this text in its slot."""
        super().leave(row, text)
        self.idle[row.slot] = None

    def clear(self) -> None:
        """Send all rows away; what they left stays."""
        self.idle |= dict.fromkeys(row.slot for row in self.rows if row is not None)
        self.rows = []

    def went(self, rows: list[Row]) -> None:
        """The rows that were prefilled early have no slot any more; what is whole in it stays."""
        for row in rows:
            if row.length == len(row.text):
                self.residents.hold(row.slot, row.text)
            self.idle[row.slot] = None
