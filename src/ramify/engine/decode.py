"""The crowd of active rows: who sits in which slot, what is prefilled, and one decode step for all."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ramify.engine.engine import Request, Segment
from ramify.engine.forward import Forward
from ramify.engine.kv import ROUND, Reach, Slots, rounded
from ramify.engine.radix import Trie, common
from ramify.engine.rng import streams, uniforms
from ramify.engine.sampling import Drawn, Knobs, draw

PIECE = 2048  # padded tokens of one prefill pass
SHARED = 32  # tokens that two waiting prefixes must share before one of them waits for the other's prefill
FOR_SLOTS = 0.75  # share of the memory that several slots may take; the rest remembers finished rows


@dataclass(eq=False, slots=True)
class Ticket:
    """A request and who waits for it."""

    request: Request
    future: asyncio.Future[Segment]


@dataclass(eq=False, slots=True)
class Row:
    """One active request; its KV lies in the slot of its index in the crowd."""

    ticket: Ticket
    prefix: tuple[int, ...]
    slot: int
    length: int = 0  # tokens whose KV the slot holds; the next one to run sits at this position
    known: int = 0  # tokens at the start of the prefix that were in KV at some time
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)


class Decoder:
    """Continuous batching over slots, without any clock: what it does depends on the requests and their order alone.

    Rows are dense: slots 0 to A-1 decode together. The last token of every prefix is run by a decode step, so a request whose
    other tokens are all remembered needs no prefill.
    """

    def __init__(self, forward: Forward, vocabulary: int, limit: int, slots: int, memory: int) -> None:
        self.forward, self.vocabulary, self.limit, self.most, self.memory = forward, vocabulary, limit, slots, memory
        self.geometry = forward.geometry
        self.slots = Slots(self.geometry)
        self.trie = Trie(self.geometry.token_bytes)
        self.waiting: deque[Ticket] = deque()
        self.rows: list[Row | None] = []  # None is a hole left by a finished row
        self.capacity = 0  # tokens a slot must hold
        self.version = 0
        self.counters = dict.fromkeys(("sampled", "prefilled", "reused", "prefilled_again", "steps", "row_steps"), 0)
        self._stale = True  # the columns below do not belong to the rows

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

    def forget(self) -> None:
        """Drop all KV: the weights have changed. Slots keep their memory for the next requests."""
        assert not self.rows
        self.trie.clear()
        self.capacity = 0

    def release(self) -> None:
        """Drop all KV and give its memory back."""
        self.forget()
        self.slots.drop()

    def fail(self, error: BaseException | None) -> None:
        """End everything: hand `error` to all who wait (None cancels them), and forget the KV."""
        tickets = [row.ticket for row in self.rows if row is not None] + list(self.waiting)
        self.rows, self._stale = [], True
        self.waiting.clear()
        self.release()
        for ticket in tickets:
            if not ticket.future.done():
                if error is None:
                    ticket.future.cancel()
                else:
                    ticket.future.set_exception(error)

    # ---- who sits where

    def admit(self) -> None:
        """Seat waiting requests in holes and free slots, first come first served, and close the holes that remain."""
        seated: list[Row] = []
        active = sum(row is not None for row in self.rows)
        while self.waiting:
            request = self.waiting[0].request
            if self.waiting[0].future.cancelled():
                self.waiting.popleft()
                continue
            capacity = max(self.capacity, rounded(len(request.prefix) + request.sampling.max_tokens))
            if active + len(seated) + 1 > self._room(capacity):
                break
            self.capacity = capacity
            seated.append(Row(self.waiting.popleft(), request.prefix, -1))
        self._seat(seated)
        if seated:
            self._start(seated)

    def _room(self, capacity: int) -> int:
        """Slots of that capacity that the budget allows, at least one."""
        return min(self.most, max(1, int(self.memory * FOR_SLOTS) // (capacity * self.geometry.token_bytes)))

    def _seat(self, seated: list[Row]) -> None:
        """Give each newcomer a slot: holes first, then the end."""
        room = self._room(self.capacity) if self.capacity else 0
        if seated and (room, self.capacity) != (self.slots.rows, self.slots.capacity):
            self._close()
            self.trie.shrink(max(0, self.memory - room * self.capacity * self.geometry.token_bytes))
            self.slots.resize(room, self.capacity, len(self.rows))
        holes = deque(i for i, row in enumerate(self.rows) if row is None)
        for row in seated:
            row.slot = holes.popleft() if holes else len(self.rows)
            self.rows[row.slot : row.slot + 1] = [row]
            self._stale = True
        self._close()

    def _close(self) -> None:
        """Move the last rows into the holes."""
        for i in range(len(self.rows)):
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if i < len(self.rows) and self.rows[i] is None:
                row = self.rows.pop()
                assert row is not None
                self.slots.move(row.slot, i, row.length)
                self.rows[i], row.slot = row, i

    # ---- prefixes into KV

    def _start(self, seated: list[Row]) -> None:
        """Bring the prefix of each newcomer, but for its last token, into its slot: copied where remembered, else prefilled."""
        for row in seated:
            found, row.length, row.known = self.trie.match(row.prefix[:-1])
            at = 0
            for chunk, n in found:
                self.slots.put(row.slot, at, chunk, n)
                at += n
            self.counters["reused"] += row.length
            self.counters["prefilled"] += 1  # the last token, by the next step
        pending = [row for row in seated if row.length < len(row.prefix) - 1]
        while pending:
            pending = self._wave(pending)

    def _wave(self, pending: list[Row]) -> list[Row]:
        """Prefill each distinct prefix once; those that share a good part copy it afterwards. Returns who is not done yet."""
        leaders: dict[tuple[int, ...], Row] = {}
        followers: list[tuple[Row, Row]] = []
        for row in pending:
            leader = leaders.setdefault(row.prefix[:-1][: row.length + SHARED], row)
            if leader is not row:
                followers.append((row, leader))
        self._prefill(list(leaders.values()))
        for row in leaders.values():
            self._remember(row, row.prefix[:-1])
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
        n, device = max(sizes), self.geometry.device
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

    def _remember(self, row: Row, sequence: tuple[int, ...]) -> None:
        self.trie.insert(sequence, lambda start, stop: self.slots.get(row.slot, start, stop))

    # ---- tokens out

    def step(self) -> int:
        """Run one token of every row and sample the next; returns how many rows finished."""
        rows: list[Row] = self.rows  # type: ignore[assignment]  # dense after admit
        if self._stale:
            self._columns(rows)
        device = self.geometry.device
        last = [row.tokens[-1] if row.tokens else row.prefix[-1] for row in rows]
        at = [row.length for row in rows]
        both = torch.tensor((last, at), device=device)[:, :, None]  # [2, A, 1]
        reach = Reach(self.slots, both[1], min(self.slots.capacity, rounded(max(at) + 1)))
        logits = self.forward(both[0], both[1], reach, True)
        assert logits is not None
        logits = logits if logits.dtype == torch.float64 else logits.float()
        uniform = torch.from_numpy(uniforms(self._streams, self._counts)).to(device)
        self._counts += np.uint64(1)
        self.counters["steps"] += 1
        self.counters["row_steps"] += len(rows)
        self.counters["sampled"] += len(rows)
        return self._record(rows, draw(logits, self._knobs, uniform))

    def _columns(self, rows: list[Row]) -> None:
        requests = [row.ticket.request for row in rows]
        dtype = torch.float64 if self.geometry.dtype == torch.float64 else torch.float32
        self._knobs = Knobs([request.sampling for request in requests], self.geometry.device, dtype)
        self._streams = streams([request.seed for request in requests])
        self._counts = np.array([len(row.tokens) for row in rows], dtype=np.uint64)
        self._stale = False

    def _record(self, rows: list[Row], drawn: Drawn) -> int:
        finished = 0
        for i, row in enumerate(rows):
            row.length += 1
            row.tokens.append(drawn.tokens[i])
            row.logprobs.append(drawn.logprobs[i])
            row.kept.append(drawn.kept[i])
            row.entropy.append(drawn.entropy[i])
            row.temperature.append(drawn.temperature[i])
            request, future = row.ticket.request, row.ticket.future
            finish = request.until(row.tokens)
            if finish is not None or len(row.tokens) >= request.sampling.max_tokens or future.done():
                self._finish(row, finish)
                finished += 1
        return finished

    def _finish(self, row: Row, finish: str | None) -> None:
        self._remember(row, row.prefix + tuple(row.tokens[:-1]))
        self.rows[row.slot], self._stale = None, True
        if not row.ticket.future.done():
            row.ticket.future.set_result(
                Segment(row.tokens, row.logprobs, row.kept, row.entropy, row.temperature, finish, self.version)
            )
