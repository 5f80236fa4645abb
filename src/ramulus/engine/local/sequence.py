"""A request from the moment it is asked until it is answered: all that is known of it, in one object."""

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

    def fail(self, error: BaseException) -> None:
        """Let whoever waits have the error; a StopIteration, which no future takes, as what a coroutine makes of it."""
        taken: BaseException = error
        if isinstance(error, StopIteration):
            taken = RuntimeError(f"a function of this request raised {type(error).__name__}: let it return None where the text goes on")
            taken.__cause__ = error
        self.future.set_exception(taken)


@dataclass(eq=False, slots=True)
class Sequence:
    """One request, its slot of KV and its row in the batch; both are -1 while it waits."""

    request: Request
    group: Group
    index: int  # in its group
    need: int  # tokens of a slot
    until: Until | None  # asked after each of its tokens
    prefix: tuple[int, ...]
    text: tuple[int, ...]  # the prefix without its last token, which the first decode step runs
    setting: tuple[object, ...]  # temperature, top_p, top_k, min_p
    plain: bool  # its temperature is a number and nothing is truncated
    ids: frozenset[int]  # tokens that end it
    stream: int  # where its random numbers start
    early: int = 0  # tokens of its prefix that were prefilled before it was admitted
    row: int = -1  # in the batch
    slot: int = -1  # that holds its KV
    length: int = 0  # tokens of the text whose KV the slot holds
    known: int = 0  # tokens at the start of the prefix that were in KV at some time
    tokens: list[int] = field(default_factory=list)  # so far, where `until` is asked
    began: int = 0  # the step in which it joined the batch
    since: int = 0  # the step in which it came to its row
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # (row, first step, one past the last) before that

    @classmethod
    def of(cls, request: Request, group: Group, index: int, need: int, until: Until | None) -> Sequence:
        """A sequence of a request, waiting for a slot."""
        sampling, prefix = request.sampling, tuple(request.prefix)
        setting = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
        plain = not sampling.truncates and not callable(sampling.temperature)
        return cls(request, group, index, need, until, prefix, prefix[:-1], setting, plain, request.stop.ids, mix(request.seed))

    def anew(self) -> Sequence:
        """A waiting sequence for the same request, without slot or tokens, which are lost."""
        return Sequence.of(self.request, self.group, self.index, self.need, self.until)

    @property
    def over(self) -> bool:
        """Whether nobody wants its answer any more."""
        return self.group.future.done()

    def take_row(self, row: int, now: int) -> None:
        """Join the batch in this row at the step `now`, or go on in another one."""
        if self.row < 0:
            self.began = now
        elif now > self.since:
            self.spans.append((self.row, self.since, now))
        self.row, self.since = row, now

    def wait(self) -> None:
        """Give up the slot in which the prefix was prefilled early."""
        self.slot, self.length, self.known = -1, 0, 0

    def rows(self, now: int) -> list[tuple[int, int, int]]:
        """(row, first step, one past the last) of each row that it has had up to the step `now`."""
        return [*self.spans, (self.row, self.since, now)]
