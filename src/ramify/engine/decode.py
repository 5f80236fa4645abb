"""The crowd of active rows: who sits in which slot, and one decode step for all."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice

import numpy as np
import torch

from ramify.engine.compiled import CompiledForward
from ramify.engine.engine import Request, Segment
from ramify.engine.forward import Forward
from ramify.engine.kv import ROUND, Reach, Slots, rounded
from ramify.engine.prefill import Prefill
from ramify.engine.radix import Trie
from ramify.engine.record import Record
from ramify.engine.residents import Residents
from ramify.engine.rng import uniforms
from ramify.engine.rows import Row, Ticket
from ramify.engine.sampling import Drawn, Knobs, draw

FOR_SLOTS = 0.75  # share of the memory that several slots may take; the rest remembers finished rows
SPARE = 8  # slots in which prefixes of waiting requests are prefilled beside those of newcomers, where the memory has room for them


class Decoder:
    """Continuous batching over slots, without any clock: what it does depends on the requests and their order alone.

    Rows are dense: slots 0 to A-1 decode together. The last token of every prefix is run by a decode step, so a request whose
    other tokens are all remembered needs no prefill.
    """

    def __init__(self, forward: Forward, vocabulary: int, limit: int, slots: int, memory: int) -> None:
        self.forward, self.vocabulary, self.limit, self.most, self.memory = forward, vocabulary, limit, slots, memory
        self.geometry = forward.geometry
        self.quick = forward if isinstance(forward, CompiledForward) else None
        self.slots = Slots(self.geometry)
        self.trie = Trie(self.geometry.token_bytes)
        self.residents = Residents(self.slots, self.trie)
        self.waiting: deque[Ticket] = deque()
        self.rows: list[Row | None] = []  # None is a hole left by a finished row
        self._newcomers: list[Row] = []  # those that are being seated
        self.capacity = 0  # tokens a slot holds, since the last `forget`
        self.wanted = 0  # tokens the longest request since then needs
        self.version = 0
        self.counters = dict.fromkeys(
            ("sampled", "prefilled", "reused", "prefilled_again", "passes", "steps", "row_steps"), 0
        )
        self.prefill = Prefill(forward, self.slots, self.trie, self.residents, self.counters)
        self.record = Record()
        self._stale = True  # the columns below do not belong to the rows
        self._futures: list[asyncio.Future[Segment]] = []
        self._asking: list[Row] = []  # those whose `until` wants to see every token
        self._ends: frozenset[int] = frozenset()  # tokens after which some of the others are asked
        self._left = 0
        self._settings: list[tuple[object, ...]] = []  # of the rows that the knobs were made for

    @property
    def busy(self) -> bool:
        """Whether anybody waits for tokens."""
        return bool(self.waiting) or any(row is not None for row in self.rows)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that can never be served."""
        n, most = len(request.prefix), request.sampling.max_tokens
        if n == 0:
            raise ValueError("the prefix of a request is empty: give at least one token (a BOS token, say)")
        if not 0 <= min(request.prefix) <= max(request.prefix) < self.vocabulary:
            wrong = next(token for token in request.prefix if not 0 <= token < self.vocabulary)
            raise ValueError(f"token {wrong} of the prefix is outside the model's vocabulary of {self.vocabulary} tokens")
        if n + most > self.limit:
            raise ValueError(
                f"a prefix of {n} tokens and max_tokens={most} make {n + most}, the model takes {self.limit}: lower max_tokens or shorten the prompt"
            )
        size = rounded(n + most) * self.geometry.token_bytes
        if size > self.memory:
            fit = self.memory // self.geometry.token_bytes // ROUND * ROUND
            raise ValueError(
                f"one slot of {rounded(n + most)} tokens needs {size} bytes of KV, the budget is memory={self.memory}: it fits {fit} tokens; "
                f"raise memory to at least {size}, or lower max_tokens ({most}) or the prefix ({n})"
            )

    def enqueue(self, ticket: Ticket) -> None:
        """Put a checked request at the end of the line."""
        self.waiting.append(ticket)
        self.wanted = max(self.wanted, self._need(ticket.request))

    def _need(self, request: Request) -> int:
        return rounded(len(request.prefix) + request.sampling.max_tokens)

    def forget(self) -> None:
        """Drop all KV: the weights have changed. Slots keep their memory for the next requests."""
        assert not self.rows
        self.trie.clear()
        self.residents.clear()
        self.capacity = self.wanted = 0

    def release(self) -> None:
        """Drop all KV and give its memory back."""
        self.forget()
        self.slots.drop()

    def abandon(self, error: BaseException | None) -> None:
        """End every request: hand `error` to all who wait, or cancel them."""
        tickets = [row.ticket for row in (*self.rows, *self._newcomers) if row is not None] + list(self.waiting)
        self.rows, self._newcomers, self._stale, self.record = [], [], True, Record()
        self.waiting.clear()
        for ticket in tickets:
            if ticket.future.done() or ticket.future.get_loop().is_closed():
                continue
            if error is None:
                ticket.future.cancel()
            else:
                ticket.future.set_exception(error)

    def admit(self) -> None:
        """Seat waiting requests in holes and free slots, first come first served, and close the holes that remain."""
        seated: list[Row] = []
        active = sum(row is not None for row in self.rows)
        while self.waiting:
            request = self.waiting[0].request
            if self.waiting[0].future.cancelled():
                self.waiting.popleft()
                continue
            capacity = max(self.capacity, self._need(request))
            if capacity > self.capacity:  # grow seldom rather than request by request, as far as that costs no slot
                fits = self.memory // self.geometry.token_bytes // ROUND * ROUND
                ahead = min(rounded(self.capacity * 3 // 2), rounded(self.limit), fits)
                larger = [size for size in (self.wanted, ahead) if size > capacity and self._room(size) == self._room(capacity)]
                capacity = max([capacity, *larger])
            if active + len(seated) + 1 > self._room(capacity):
                break
            self.capacity = capacity
            seated.append(Row.of(self.waiting.popleft()))
        self._newcomers = seated
        if not active:
            self.record = Record()
        self._seat(seated)
        if seated:
            self.prefill.start(seated, self._next)
        self._newcomers = []

    def _next(self) -> list[Row]:
        """Rows in the spare slots for the next distinct prefixes in the line, so that short prompts are prefilled several at a time."""
        spare = range(self._room(self.capacity), self.slots.rows)
        rows: dict[tuple[int, ...], Row] = {}
        for ticket in islice(self.waiting, 8 * len(spare)):
            if len(rows) < len(spare) and self._need(ticket.request) <= self.capacity:
                rows.setdefault(tuple(ticket.request.prefix), Row.of(ticket))
        for row, slot in zip(rows.values(), spare):
            row.slot = slot
        return list(rows.values())

    def _room(self, capacity: int) -> int:
        """Slots of that capacity that the budget allows, at least one."""
        return min(self.most, max(1, int(self.memory * FOR_SLOTS) // (capacity * self.geometry.token_bytes)))

    def _with_spare(self) -> int:
        """Slots to make: those for active rows, and the spare ones if both fit."""
        room, size = self._room(self.capacity), self.capacity * self.geometry.token_bytes
        return room + SPARE if room == self.most and (room + SPARE) * size <= self.memory * FOR_SLOTS else room

    def _seat(self, seated: list[Row]) -> None:
        """Give each newcomer a slot: that which its parent has left, else another hole, else the end."""
        if seated:
            self.record.flush(self.rows)
        rows = self._with_spare() if seated else 0
        if seated and (rows, self.capacity) != (self.slots.rows, self.slots.capacity):
            self._resize(rows)
        holes = dict.fromkeys(i for i, row in enumerate(self.rows) if row is None)
        if holes:
            for row in seated:
                text = row.prefix[:-1]
                slot = self.residents.where.get(text, -1)
                if slot in holes:
                    del holes[slot]
                    self.residents.vacate(slot, stays=text)
                    row.length = row.known = len(text)
                    self._sit(row, slot)
        free = iter(holes)
        for row in seated:
            if row.slot < 0:
                slot = next(free, len(self.rows))
                self.residents.vacate(slot)
                self._sit(row, slot)
        self._close()

    def _resize(self, rows: int) -> None:
        """Make so many slots of the capacity; finished rows keep theirs where there are no fewer."""
        if rows < self.slots.rows:
            self._close()
            for slot in range(len(self.rows), self.slots.rows):
                self.residents.vacate(slot)
        stay = max(len(self.rows), self.residents.end)
        self.trie.shrink(max(0, self.memory - rows * self.capacity * self.geometry.token_bytes))
        self.slots.resize(rows, self.capacity, stay)

    def _sit(self, row: Row, slot: int) -> None:
        row.slot = slot
        self.rows[slot : slot + 1] = [row]
        self._stale = True

    def _close(self) -> None:
        """Move the last rows into the holes."""
        for i in range(len(self.rows)):
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if i < len(self.rows) and self.rows[i] is None:
                row = self.rows.pop()
                assert row is not None
                self.residents.move(row.slot, i, row.length)
                self.rows[i], row.slot = row, i

    def step(self) -> int:
        """Run one token of every row and sample the next; returns how many rows finished."""
        rows: list[Row] = self.rows  # type: ignore[assignment]  # dense after admit
        if self._stale:
            self._columns(rows)
        device = self.geometry.device
        tokens, at = torch.from_numpy(self._both).to(device).unbind(0)  # [A, 1] each
        reach = Reach(self.slots, at, min(self.slots.capacity, rounded(int(self._both[1].max()) + 1)))
        logits = self.forward(tokens, at, reach, True)
        assert logits is not None
        logits = logits if logits.dtype == torch.float64 else logits.float()
        uniform = torch.from_numpy(uniforms(self._streams, self._counts)).to(device)
        self._counts += np.uint64(1)
        self.counters["steps"] += 1
        self.counters["row_steps"] += len(rows)
        self.counters["sampled"] += len(rows)
        drawn = draw(logits, self._knobs, uniform, self.quick)
        self._both[0, :, 0] = drawn.tokens
        self._both[1] += 1
        return self._record(rows, drawn)

    def _columns(self, rows: list[Row]) -> None:
        settings = [row.setting for row in rows]
        if settings != self._settings:
            dtype = torch.float64 if self.geometry.dtype == torch.float64 else torch.float32
            self._knobs = Knobs([row.ticket.request.sampling for row in rows], self.geometry.device, dtype)
            self._settings = settings
        self._streams = np.array([row.stream for row in rows], dtype=np.uint64)
        self._counts = np.array([row.count for row in rows], dtype=np.uint64)
        self._futures = [row.ticket.future for row in rows]
        self._asking = [row for row in rows if row.ends is None]
        self._ends = frozenset[int]().union(*{row.ends for row in rows if row.ends is not None})
        self._left = min(row.most - row.count for row in rows)  # steps until some row has all its tokens
        self.record.trim(rows)
        last = [self.record.last(row) for row in rows]
        self._both = np.array((last, [row.length for row in rows]), dtype=np.int64)[:, :, None]  # [2, A, 1] next tokens, positions
        self._stale = False

    def _record(self, rows: list[Row], drawn: Drawn) -> int:
        """Keep what was drawn, and end the rows that end here; returns how many."""
        tokens, ended = drawn.tokens, {}
        self.record.steps.append(drawn)
        self._left -= 1
        for row in self._asking:
            row.tokens.append(tokens[row.slot])
            finish = row.until(row.tokens)
            if finish is not None:
                ended[row.slot] = finish
        due = {i for i, token in enumerate(tokens) if token in self._ends} if self._ends else set()
        if not (ended or due or self._left <= 0 or any(future.done() for future in self._futures)):
            return 0
        self.record.flush(rows)
        finished = 0
        for i, row in enumerate(rows):
            full, finish = row.count >= row.most, ended.get(i)
            if row.ends is not None and (full or i in due):
                finish = row.until(self.record.tokens(row))
            if finish is not None or full or row.ticket.future.done():
                self._finish(row, finish)
                finished += 1
        return finished

    def _finish(self, row: Row, finish: str | None) -> None:
        tokens = self.record.tokens(row)
        self.residents.finish(row.slot, row.prefix + tuple(tokens[:-1]))
        self.rows[row.slot], self._stale = None, True
        if not row.ticket.future.done():
            row.ticket.future.set_result(Segment(tokens, *self.record.columns(row), finish, self.version))
