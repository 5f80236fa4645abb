"""A request and its seat in the crowd."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ramulus.engine.engine import Request, Segment, Until
from ramulus.engine.rng import mix


@dataclass(eq=False, slots=True)
class Group:
    """Requests that were made together, and who waits for the last of them."""

    future: asyncio.Future[list[Segment]]
    segments: list[Segment | None]
    left: int  # how many are not answered yet


@dataclass(eq=False, slots=True)
class Ticket:
    """A request, in its place in a group."""

    request: Request
    group: Group
    index: int
    need: int  # tokens of a slot
    until: Until | None  # asked after each token
    early: int = 0  # tokens of its prefix that were prefilled before it had a seat


@dataclass(eq=False, slots=True)
class Row:
    """One active request."""

    ticket: Ticket
    prefix: tuple[int, ...]
    text: tuple[int, ...]  # the prefix without its last token, which the first decode step runs
    until: Until | None  # asked after each of its tokens
    most: int  # tokens to sample
    setting: tuple[object, ...]  # temperature, top_p, top_k, min_p
    stream: int  # where its random numbers start
    ids: frozenset[int]  # tokens that end it
    plain: bool  # its temperature is a number and nothing is truncated
    place: int = -1  # in the crowd
    slot: int = -1  # that holds its KV
    length: int = 0  # tokens of the text whose KV the slot holds
    known: int = 0  # tokens at the start of the prefix that were in KV at some time
    tokens: list[int] = field(default_factory=list)  # so far, where `until` is asked
    began: int = 0  # the step in which it sat down
    since: int = 0  # the step in which it came to its place
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # (place, first step, one past the last) before that

    def sit(self, place: int, now: int) -> None:
        """Take a place in the crowd, or another one."""
        if self.place < 0:
            self.began = now
        elif now > self.since:
            self.spans.append((self.place, self.since, now))
        self.place, self.since = place, now

    def sat(self, now: int) -> list[tuple[int, int, int]]:
        """(place, first step, one past the last) of each place that it has had up to the step `now`."""
        return [*self.spans, (self.place, self.since, now)]

    @classmethod
    def of(cls, ticket: Ticket) -> Row:
        """A row without a seat."""
        request = ticket.request
        how, prefix = request.sampling, tuple(request.prefix)
        setting = (how.temperature, how.top_p, how.top_k, how.min_p)
        plain = not how.truncates and not callable(how.temperature)
        return cls(ticket, prefix, prefix[:-1], ticket.until, how.max_tokens, setting, mix(request.seed), request.stop.ids, plain)
