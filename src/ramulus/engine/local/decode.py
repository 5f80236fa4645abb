"""The crowd of active rows: who waits, who is seated, and decode steps for all."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch

from ramulus.engine.engine import COUNTERS, Decode, Request, Segment
from ramulus.engine.local.columns import COUNT, LEFT, POSITION, SLOT, STREAM, TOKEN, Columns
from ramulus.engine.local.compiled import CompiledForward, Steps
from ramulus.engine.local.forward import Forward
from ramulus.engine.local.kv import ROUND, Reach, rounded
from ramulus.engine.local.prefill import Prefill
from ramulus.engine.local.record import Record
from ramulus.engine.local.rows import Group, Row, Ticket
from ramulus.engine.local.sampling import Knobs, draw
from ramulus.engine.local.seating import SPARE, Pool, Seating
from ramulus.engine.rng import uniforms
from ramulus.engine.stops import watched


class Decoder:
    """Continuous batching over slots, without any clock: what it does depends on the requests and their order alone.

    The last token of every prefix is run by a decode step, so a request whose other tokens are all remembered needs no prefill.
    """

    def __init__(self, forward: Forward, vocabulary: int, limit: int, slots: int, memory: int, decode: Decode | None) -> None:
        self.forward, self.vocabulary, self.limit, self.memory, self.decode = forward, vocabulary, limit, memory, decode
        self.geometry = forward.geometry
        self.quick = forward if isinstance(forward, CompiledForward) else None
        if self.quick is None:
            self.seating = Seating(self.geometry, slots, memory)
        else:
            self.seating = Pool(self.geometry, slots, memory, limit, self.quick)
        self.waiting: deque[Ticket] = deque()
        self._newcomers: list[Row] = []  # those that are being seated
        self.version = 0
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.prefill = Prefill(forward, self.seating, self.counters)
        self.columns, self.record = Columns(slots, vocabulary), Record(slots)
        self.steps = None if self.quick is None else Steps(self.quick, slots)
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
            if before is None or request.stop is not before.stop:
                watched(request, self.decode)
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
        need, decode = self.seating.need, self.decode
        tickets = [Ticket(request, group, i, need(request), watched(request, decode)) for i, request in enumerate(requests)]
        self.waiting += tickets
        self.seating.wanted = max(self.seating.wanted, *[ticket.need for ticket in tickets])

    def forget(self) -> None:
        """Drop all KV: the weights have changed. Slots keep their memory for the next requests."""
        self.seating.forget()

    def release(self) -> None:
        """Drop all KV and give its memory back, and that of what was sampled."""
        self.seating.release()
        self.record = Record(self.seating.most)
        if self.steps is not None:
            self.steps.release()

    def abandon(self, error: BaseException | None) -> None:
        """End every request: hand `error` to all who wait, or cancel them."""
        tickets = [row.ticket for row in (*self.rows, *self._newcomers) if row is not None] + list(self.waiting)
        self.seating.clear()
        self.columns.clear(self.rows)
        self._newcomers = []
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
            self.columns.clear(seating.rows)
        slots = seating.slots.store
        self.columns.move(seating.seat(seated, self.record.now))
        if seated:
            seating.went(self.prefill.start(seated, self._next))
            if slots is not seating.slots.store:
                self.columns.seats()
            self.columns.join(seated)
        self._newcomers = []

    def _next(self) -> list[Row]:
        """Rows in spare slots for the next distinct prefixes in the line, so that short prompts are prefilled several at a time."""
        where, found = self.seating.residents.where, dict[tuple[int, ...], Ticket]()
        for ticket in islice(self.waiting, 8 * SPARE):
            prefix = tuple(ticket.request.prefix)
            fits = ticket.need <= self.seating.capacity and not ticket.group.future.done()
            if fits and prefix not in found and prefix[:-1] not in where and len(found) < SPARE:
                found[prefix] = ticket
        slots = self.seating.early(len(found))
        rows = [Row.of(ticket) for ticket in islice(found.values(), len(slots))]
        for row, slot in zip(rows, slots, strict=True):
            row.slot = slot
        return rows

    def step(self) -> int:
        """Run one token of every row and sample the next, or several where nobody has to look at each; returns how many groups are answered."""
        columns, before = self.columns, self.record.now
        if self.steps is None or columns.special:
            self._one()
        else:
            left = 1 if columns.asking else int(columns.state[LEFT, : columns.n].min())
            self.steps.run(columns, self.seating.slots, self.record, left)
            self._look(self.steps)
        steps = self.record.now - before
        self.counters["steps"] += steps
        for name in ("row_steps", "sampled"):
            self.counters[name] += steps * columns.n
        return self._end()

    def _one(self) -> None:
        """One step through torch."""
        columns, slots, device = self.columns, self.seating.slots, self.geometry.device
        rows: list[Row] = columns.rows  # type: ignore[assignment]  # without holes after admit
        state = columns.state[:, : len(rows)]
        settings = [row.setting for row in rows]
        if settings != self._settings:
            dtype = torch.float64 if self.geometry.dtype == torch.float64 else torch.float32
            self._knobs = Knobs([row.ticket.request.sampling for row in rows], device, dtype)
            self._settings = settings
        tokens, at = torch.from_numpy(state[[TOKEN, POSITION]][:, :, None]).to(device).unbind(0)  # [A, 1] each
        seats = None if self.quick is None else torch.from_numpy(state[SLOT])
        reach = Reach(slots, at, min(slots.capacity, rounded(int(state[POSITION].max()) + 1)), seats)
        logits = self.forward(tokens, at, reach, True)
        assert logits is not None
        logits = logits if logits.dtype == torch.float64 else logits.float()
        uniform = torch.from_numpy(uniforms(state[STREAM].view(np.uint64), state[COUNT].view(np.uint64))).to(device)
        drawn = draw(logits, self._knobs, uniform, self.quick)
        self.record.add(drawn, rows)
        state[TOKEN] = drawn.tokens
        state[[POSITION, COUNT]] += 1
        state[LEFT] -= 1

    def _look(self, steps: Steps) -> None:
        """Where some logits of the last step are NaN or infinite, let torch look into it."""
        record, n = self.record, self.columns.n
        if not np.isnan(record.numbers[1, record.now - 1 - record.first, :n]).any():
            return
        rows: list[Row] = self.columns.rows  # type: ignore[assignment]
        knobs = Knobs([row.ticket.request.sampling for row in rows], self.geometry.device, torch.float32)
        drawn = draw(steps.logits[:n], knobs, torch.from_numpy(steps.uniform[:n]))
        record.now -= 1
        record.add(drawn, rows)
        self.columns.state[TOKEN, :n] = drawn.tokens

    def _end(self) -> int:
        """End the rows that end after this step; returns how many groups are answered."""
        columns, record = self.columns, self.record
        tokens = record.tokens[record.now - 1 - record.first, : columns.n]
        places = columns.ended(tokens)
        finishes: dict[int, str] = {}
        for asking in columns.asking:
            asking.tokens.append(int(tokens[asking.place]))
            assert asking.until is not None
            finish = asking.until(asking.tokens)
            if finish is not None:
                finishes[asking.place] = finish
        cancelled = any(future.done() for future in columns.futures)
        answered = 0
        for i in range(columns.n) if cancelled else sorted({*places, *finishes}):
            row = columns.rows[i]
            assert row is not None
            finish = finishes.get(i) or ("eos" if int(tokens[i]) in row.ids else None)
            if finish is not None or columns.state[LEFT, i] <= 0 or row.ticket.group.future.done():
                answered += self._finish(row, finish)
        return answered

    def _finish(self, row: Row, finish: str | None) -> bool:
        """The row leaves; whether its group is answered now, or wants no answer any more."""
        group, sampled = row.ticket.group, self.record.sampled(row)
        self.seating.leave(row, row.prefix + tuple(sampled[:-1]))
        self.columns.leave(row)
        if not group.future.done():
            group.segments[row.ticket.index] = self._segment(row, sampled, finish)
            group.left -= 1
            if group.left:
                return False
            group.future.set_result([segment for segment in group.segments if segment is not None])
        return True

    def _segment(self, row: Row, sampled: array[int], finish: str | None) -> Segment:
        """What is recorded of a row."""
        sampling, (logprobs, entropy, *rest) = row.ticket.request.sampling, self.record.columns(row)
        kept = rest[0] if sampling.truncates else None
        temperature = rest[1] if callable(sampling.temperature) else float(sampling.temperature)
        return Segment(sampled, logprobs, finish, self.version, self.version, kept, entropy, temperature)
