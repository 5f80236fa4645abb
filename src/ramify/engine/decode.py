"""The crowd of active rows: who waits, who is seated, and decode steps for all."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch

from ramify.engine.compiled import CompiledForward, Crowd
from ramify.engine.engine import Request, Segment
from ramify.engine.forward import Forward
from ramify.engine.kv import ROUND, Reach, rounded
from ramify.engine.prefill import Prefill
from ramify.engine.record import Block, Record
from ramify.engine.rng import uniforms
from ramify.engine.rows import Group, Row, Ticket
from ramify.engine.sampling import Knobs, draw
from ramify.engine.seating import Pool, Seating


class Decoder:
    """Continuous batching over slots, without any clock: what it does depends on the requests and their order alone.

    The last token of every prefix is run by a decode step, so a request whose other tokens are all remembered needs no prefill.
    """

    def __init__(self, forward: Forward, vocabulary: int, limit: int, slots: int, memory: int) -> None:
        self.forward, self.vocabulary, self.limit, self.memory = forward, vocabulary, limit, memory
        self.geometry = forward.geometry
        self.quick = forward if isinstance(forward, CompiledForward) else None
        self.seating = Seating(self.geometry, slots, memory) if self.quick is None else Pool(self.geometry, slots, memory, self.quick)
        self.waiting: deque[Ticket] = deque()
        self._newcomers: list[Row] = []  # those that are being seated
        self.version = 0
        self.counters = dict.fromkeys(
            ("sampled", "prefilled", "reused", "prefilled_again", "passes", "steps", "row_steps"), 0
        )
        self.prefill = Prefill(forward, self.seating, self.counters)
        self.record = Record()
        self._stale = True  # the columns below do not belong to the rows
        self._crowd: Crowd | None = None  # the columns as the kernels want them, where they can take several steps at once
        self._futures: list[asyncio.Future[list[Segment]]] = []
        self._asking: list[Row] = []  # those whose `until` wants to see every token
        self._ends: frozenset[int] = frozenset()  # tokens after which some of the others are asked
        self._left = 0  # steps until some row has all its tokens
        self._settings: list[tuple[object, ...]] = []  # of the rows that the knobs were made for

    @property
    def rows(self) -> list[Row | None]:
        """The crowd."""
        return self.seating.rows

    @property
    def busy(self) -> bool:
        """Whether anybody waits for tokens."""
        return bool(self.waiting) or self.seating.active > 0

    def check(self, requests: Sequence[Request]) -> None:
        """Raise ValueError for a request that can never be served."""
        before: Request | None = None
        for request in requests:
            if before is None or request.prefix is not before.prefix or request.sampling is not before.sampling:
                self._check(request)  # siblings ask the same
            before = request

    def _check(self, request: Request) -> None:
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

    def enqueue(self, group: Group, requests: Sequence[Request]) -> None:
        """Put checked requests at the end of the line."""
        tickets = [Ticket(request, group, i, self.seating.need(request)) for i, request in enumerate(requests)]
        self.waiting += tickets
        self.seating.wanted = max(self.seating.wanted, *[ticket.need for ticket in tickets])

    def forget(self) -> None:
        """Drop all KV: the weights have changed. Slots keep their memory for the next requests."""
        self.seating.forget()

    def release(self) -> None:
        """Drop all KV and give its memory back."""
        self.seating.release()

    def abandon(self, error: BaseException | None) -> None:
        """End every request: hand `error` to all who wait, or cancel them."""
        tickets = [row.ticket for row in (*self.rows, *self._newcomers) if row is not None] + list(self.waiting)
        self.seating.clear()
        self._newcomers, self._stale, self.record = [], True, Record()
        self.waiting.clear()
        for future in dict.fromkeys(ticket.group.future for ticket in tickets):
            if future.done() or future.get_loop().is_closed():
                continue
            if error is None:
                future.cancel()
            else:
                future.set_exception(error)

    def admit(self) -> None:
        """Seat waiting requests, first come first served."""
        seating, seated = self.seating, self._newcomers
        active = seating.active
        while self.waiting:
            if self.waiting[0].group.future.done():  # cancelled
                self.waiting.popleft()
                continue
            if not seating.fits(self.waiting[0].need, active + len(seated), self.limit):
                break
            seated.append(Row.of(self.waiting.popleft()))
        if not active:
            self.record = Record()
        elif seated:
            self.record.flush(self.rows)
        if seating.seat(seated):
            self._stale = True
        if seated:
            seating.vacate([row.slot for row in self.prefill.start(seated, self._next)])
        self._newcomers = []

    def _next(self) -> list[Row]:
        """Rows in spare slots for the next distinct prefixes in the line, so that short prompts are prefilled several at a time."""
        spare, where = self.seating.early(), self.seating.residents.where
        rows: dict[tuple[int, ...], Row] = {}
        for ticket in islice(self.waiting, 8 * len(spare)):
            if len(rows) < len(spare) and ticket.need <= self.seating.capacity:
                row = Row.of(ticket)
                if row.text not in where:
                    rows.setdefault(row.prefix, row)
        for row, slot in zip(rows.values(), spare):
            row.slot = slot
        self.seating.vacate(spare[len(rows) :])
        return list(rows.values())

    def step(self) -> int:
        """Run one token of every row and sample the next, or several where nobody has to look at each; returns how many groups are answered."""
        if self._stale:
            self._columns()
        block = self._one() if self._crowd is None else self._several(self._crowd)
        self.counters["steps"] += block.steps
        for name in ("row_steps", "sampled"):
            self.counters[name] += block.steps * len(self.rows)
        return self._record(block)

    def _one(self) -> Block:
        """One step through torch."""
        device, slots = self.geometry.device, self.seating.slots
        tokens, at = torch.from_numpy(self._both).to(device).unbind(0)  # [A, 1] each
        reach = Reach(slots, at, min(slots.capacity, rounded(int(self._both[1].max()) + 1)), self._seats)
        logits = self.forward(tokens, at, reach, True)
        assert logits is not None
        logits = logits if logits.dtype == torch.float64 else logits.float()
        uniform = torch.from_numpy(uniforms(self._streams, self._counts)).to(device)
        drawn = draw(logits, self._knobs, uniform, self.quick)
        self._both[0, :, 0] = drawn.tokens
        self._both[1] += 1
        self._counts += np.uint64(1)
        return Block.of(drawn)

    def _several(self, crowd: Crowd) -> Block:
        """Steps in one call, until a row has all its tokens or one that may end its text."""
        steps = crowd.run(1 if self._asking else self._left)
        tokens, logprobs, entropy = crowd.drawn(steps)
        if any(nats[-1] != nats[-1] for nats in entropy):  # NaN: some logit of the last step is NaN or infinite, which torch looks into
            drawn = draw(crowd.logits, self._knobs, torch.from_numpy(crowd.uniform))
            for place, (token, logprob, nats) in enumerate(zip(drawn.tokens, drawn.logprobs, drawn.entropy)):
                tokens[place][-1], logprobs[place][-1], entropy[place][-1] = token, logprob, nats
            crowd.tokens[:] = drawn.tokens
        heat = self._knobs.fixed
        return Block(steps, tokens, logprobs, [[0.0] * steps for _ in heat], entropy, [[t] * steps for t in heat])

    def _columns(self) -> None:
        rows: list[Row] = self.rows  # type: ignore[assignment]  # dense after admit
        settings = [row.setting for row in rows]
        if settings != self._settings:
            dtype = torch.float64 if self.geometry.dtype == torch.float64 else torch.float32
            self._knobs = Knobs([row.ticket.request.sampling for row in rows], self.geometry.device, dtype)
            self._settings = settings
        self._futures = list(dict.fromkeys(row.ticket.group.future for row in rows))
        self._asking = [row for row in rows if row.ends is None]
        self._ends = frozenset[int]().union(*{row.ends for row in rows if row.ends is not None})
        self._left = min(row.most - row.count for row in rows)
        self.record.trim(rows)
        last, at = [self.record.last(row) for row in rows], [row.length for row in rows]
        self._streams = np.array([row.stream for row in rows], dtype=np.uint64)
        self._counts = np.array([row.count for row in rows], dtype=np.uint64)
        self._both = np.array((last, at), dtype=np.int64)[:, :, None]  # [2, A, 1] next tokens, positions
        seats = np.array([row.slot for row in rows], dtype=np.int64)
        self._seats = None if self.quick is None else torch.from_numpy(seats)
        self._crowd = None
        if self.quick is not None and not self._knobs.rules and self._knobs.cut is None:
            told = (self._both[0, :, 0], self._both[1, :, 0], seats, self._streams, self._counts)
            self._crowd = Crowd(self.quick, self.seating.slots, told, self._knobs.temperature, self._ends)
        self._stale = False

    def _record(self, block: Block) -> int:
        """Keep what was drawn, and end the rows that end here; returns how many groups are answered."""
        rows: list[Row] = self.rows  # type: ignore[assignment]  # dense until some end
        ended = {}
        self.record.add(block)
        self._left -= block.steps
        for row in self._asking:
            row.tokens.append(block.tokens[row.place][0])
            finish = row.until(row.tokens)
            if finish is not None:
                ended[row.place] = finish
        ends = self._ends
        due = {i for i, line in enumerate(block.tokens) if line[-1] in ends} if ends else set()
        if not (ended or due or self._left <= 0 or any(future.done() for future in self._futures)):
            return 0
        self.record.flush(rows)
        answered = 0
        for i, row in enumerate(list(rows)):
            full, finish = row.count >= row.most, ended.get(i)
            if row.ends is not None and (full or i in due):
                finish = row.until(self.record.tokens(row))
            if finish is not None or full or row.ticket.group.future.done():
                answered += self._finish(row, finish)
        return answered

    def _finish(self, row: Row, finish: str | None) -> bool:
        """The row leaves; whether its group is answered now, or wants no answer any more."""
        tokens, group = self.record.tokens(row), row.ticket.group
        self.seating.leave(row, row.prefix + tuple(tokens[:-1]))
        self._stale = True
        if not group.future.done():
            group.segments[row.ticket.index] = Segment(tokens, *self.record.columns(row), finish, self.version)
            group.left -= 1
            if group.left:
                return False
            group.future.set_result([segment for segment in group.segments if segment is not None])
        return True
