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
    tokens: list[int] = field(default_factory=list)
    recorded: list[tuple[float, float, float, float]] = field(default_factory=list)  # of each token: logprob, kept, entropy, temperature

    @classmethod
    def of(cls, ticket: Ticket) -> Row:
        """A row without a seat."""
        request = ticket.request
        how = request.sampling
        setting = (how.temperature, how.top_p, how.top_k, how.min_p)
        return cls(ticket, tuple(request.prefix), request.until, how.max_tokens, setting, mix(request.seed))
