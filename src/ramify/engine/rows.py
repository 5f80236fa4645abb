"""A request and its seat in the crowd."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ramify.engine.engine import Request, Segment, Until
from ramify.engine.rng import mix


@dataclass(eq=False, slots=True)
class Ticket:
    """A request and who waits for it."""

    request: Request
    future: asyncio.Future[Segment]
    early: int = 0  # tokens of its prefix that were prefilled before it had a seat


@dataclass(eq=False, slots=True)
class Row:
    """One active request; its KV lies in the slot of its index in the crowd."""

    ticket: Ticket
    prefix: tuple[int, ...]
    until: Until
    most: int  # tokens to sample
    setting: tuple[object, ...]  # temperature, top_p, top_k, min_p
    stream: int  # where its random numbers start
    slot: int = -1
    length: int = 0  # tokens whose KV the slot holds; the next one to run sits at this position
    known: int = 0  # tokens at the start of the prefix that were in KV at some time
    ends: frozenset[int] | None = None  # as in its request
    tokens: list[int] = field(default_factory=list)  # so far, where `until` is asked after each
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, first step, one past the last) of the record
    count: int = 0  # tokens sampled, as `length`, up to the last flush of the record

    def sat(self, step: int, count: int) -> None:
        """The row was in its slot for so many more steps."""
        if self.spans and self.spans[-1][::2] == (self.slot, step):
            self.spans[-1] = (self.slot, self.spans[-1][1], step + count)
        else:
            self.spans.append((self.slot, step, step + count))
        self.length += count
        self.count += count

    @classmethod
    def of(cls, ticket: Ticket) -> Row:
        """A row without a seat."""
        request = ticket.request
        how = request.sampling
        setting = (how.temperature, how.top_p, how.top_k, how.min_p)
        return cls(ticket, tuple(request.prefix), request.until, how.max_tokens, setting, mix(request.seed), ends=request.ends)
