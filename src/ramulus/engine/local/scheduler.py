"""The scheduler: who waits, who runs, and decode steps for all that run."""

from __future__ import annotations

import warnings
from array import array
from collections import abc, deque
from itertools import islice

import numpy as np
import torch

from ramulus.engine.engine import COUNTERS, Decode, Request, Segment
from ramulus.engine.local.batch import COUNT, LEFT, POSITION, SLOT, STREAM, TOKEN, Batch
from ramulus.engine.local.compiled import CompiledForward, DecodeSteps
from ramulus.engine.local.forward import Forward
from ramulus.engine.local.kv import ROUND, Reach, rounded
from ramulus.engine.local.prefill import Prefill
from ramulus.engine.local.samples import Samples
from ramulus.engine.local.sampling import SamplingBatch, draw
from ramulus.engine.local.sequence import Group, Sequence
from ramulus.engine.local.slots import SPARE, AlignedSlots, PooledSlots, SlotAllocator, SlotMemory
from ramulus.engine.rng import uniforms
from ramulus.engine.stops import watched
from ramulus.native.memory import GB, give_back


class Scheduler:
    """Continuous batching over slots, without any clock: what it does depends on the requests and their order alone.

    The last token of every prefix is run by a decode step, so a request whose other tokens are all remembered needs no prefill.
    """

    def __init__(self, forward: Forward, vocabulary: int, limit: int, slots: int, memory: int, decode: Decode | None) -> None:
        self.forward, self.vocabulary, self.limit, self.decode = forward, vocabulary, limit, decode
        self.geometry = forward.geometry
        self.kernels = forward if isinstance(forward, CompiledForward) else None
        self.version = 0
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.waiting: deque[Sequence] = deque()
        self.budget = memory  # that requests are checked against; `memory` may be less once an allocation has failed
        self._arrange(slots, memory)

    def _arrange(self, slots: int, memory: int) -> None:
        """Room for so many rows, and so many bytes of KV; nothing runs."""
        self.memory = SlotMemory(self.geometry, slots, memory, self.kernels)
        self.allocator: SlotAllocator = AlignedSlots(self.memory) if self.kernels is None else PooledSlots(self.memory, self.limit)
        self._newcomers: list[Sequence] = []  # those that are being admitted
        self.prefill = Prefill(self.forward, self.allocator, self.counters)
        self.batch, self.samples = Batch(slots, self.vocabulary), Samples(slots)
        self.steps = None if self.kernels is None else DecodeSteps(self.kernels, slots)
        self._settings: list[tuple[object, ...]] = []  # of the rows that the sampling batch was made for

    def halve(self) -> bool:
        """Go on with half the rows and half the memory, after an allocation that failed; whoever ran begins anew and draws the same tokens.

        Says so in a warning; False where one row is left that memory cannot hold, or nobody waits.
        """
        running = self.batch.running
        sequences = [s for s in dict.fromkeys([*running, *self._newcomers, *self.waiting]) if not s.over]
        most, memory = self.memory.most, self.memory.memory
        longest = max((sequence.need for sequence in sequences), default=0) * self.geometry.token_bytes
        slots, room = max(1, most // 2), min(memory, max(longest, memory // 2))
        if not sequences or (slots, room) == (most, memory):
            return False
        self.counters["sampled"] -= sum(max(0, self.samples.counted - sequence.began) for sequence in running)
        self.memory.slots.drop()
        if self.kernels is not None:
            self.kernels.release()
        self._arrange(slots, room)
        self.waiting = deque(sequence.anew() for sequence in sequences)
        self.memory.wanted = max(sequence.need for sequence in sequences)
        give_back()
        warnings.warn(
            f"memory did not hold {most} sequences with {memory / GB:.2f} GB of keys and values: from here on {slots} decode together, "
            f"with {room / GB:.2f} GB; nothing is lost",
            RuntimeWarning,
            stacklevel=2,
        )
        return True

    @property
    def busy(self) -> bool:
        """Whether anybody waits for tokens."""
        return bool(self.waiting) or bool(self.batch.running)

    def check(self, requests: abc.Sequence[Request]) -> None:
        """Raise ValueError for a request that can never be served."""
        before: Request | None = None
        for request in requests:
            if before is None or request.prefix is not before.prefix or request.sampling is not before.sampling:
                self._check(request)  # siblings ask the same
            if before is None or request.stop is not before.stop:
                watched(request, self.decode)
            before = request

    def _check(self, request: Request) -> None:
        n, most, memory = len(request.prefix), request.sampling.max_tokens, self.budget
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
        if size > memory:
            fit = memory // self.geometry.token_bytes // ROUND * ROUND
            raise ValueError(
                f"one slot of {rounded(n + most)} tokens needs {size} bytes of KV, the budget is memory={memory}: it fits {fit} tokens; "
                f"raise memory to at least {size}, or lower max_tokens ({most}) or the prefix ({n})"
            )

    def enqueue(self, group: Group, requests: abc.Sequence[Request]) -> None:
        """Put checked requests at the end of the line."""
        need, decode = self.memory.need, self.decode
        sequences = [Sequence.of(request, group, i, need(request), watched(request, decode)) for i, request in enumerate(requests)]
        self.waiting += sequences
        self.memory.wanted = max(self.memory.wanted, *[sequence.need for sequence in sequences])

    def forget(self) -> None:
        """Drop all KV: the weights have changed. Slots keep their memory for the next requests."""
        self.allocator.forget()

    def release(self) -> None:
        """Drop all KV and give its memory back, and that of what was sampled."""
        self.memory.slots.drop()
        self.allocator.forget()
        self.samples = Samples(self.memory.most)
        if self.steps is not None:
            self.steps.release()

    def abandon(self, error: BaseException | None) -> None:
        """End every request: hand `error` to all who wait, or cancel them."""
        sequences = [*self.batch.running, *self._newcomers, *self.waiting]
        self.allocator.abandon(self.batch)
        self.batch.clear()
        self._newcomers = []
        self.waiting.clear()
        for group in dict.fromkeys(sequence.group for sequence in sequences):
            if group.future.done() or group.future.get_loop().is_closed():
                continue
            if error is None:
                group.future.cancel()
            else:
                group.fail(error)

    def admit(self) -> None:
        """Let waiting sequences run, first come first served."""
        newcomers, running = self._newcomers, len(self.batch.running)
        while self.waiting:
            if self.waiting[0].over:  # cancelled
                self.waiting.popleft()
                continue
            if not self.memory.admits(self.waiting[0].need, running + len(newcomers), self.limit):
                break
            newcomers.append(self.waiting.popleft())
        if not running:
            self.batch.begin()
        store = self.memory.slots.store
        self.allocator.assign(newcomers, self.batch, self.samples.now)
        if newcomers:
            self.allocator.give_back(self.prefill.start(newcomers, self._next))
            if store is not self.memory.slots.store:
                self.batch.read_slots()
            self.batch.join(newcomers)
        self._newcomers = []

    def _next(self) -> list[Sequence]:
        """Waiting sequences with the next distinct prefixes, in slots for a while, so that short prompts are prefilled several at a time."""
        remembered, capacity = self.memory.cache.slot_of, self.memory.capacity
        by_prefix = dict[tuple[int, ...], Sequence]()
        for sequence in islice(self.waiting, 8 * SPARE):
            if sequence.need > capacity or sequence.over or sequence.text in remembered or len(by_prefix) == SPARE:
                continue
            by_prefix.setdefault(sequence.prefix, sequence)
        slots = self.allocator.early(len(by_prefix))
        sequences = list(islice(by_prefix.values(), len(slots)))
        for sequence, slot in zip(sequences, slots, strict=True):
            sequence.slot = slot
        return sequences

    def step(self) -> int:
        """Run one token of every sequence and sample the next, or several where nobody has to look at each; returns how many groups are answered."""
        batch, before = self.batch, self.samples.now
        if self.steps is None or batch.special:
            self._one()
        else:
            left = 1 if batch.asking else int(batch.state[LEFT, : batch.n].min())
            self.steps.run(batch, self.memory.slots, self.samples, left)
            self._check_last(self.steps)
        steps = self.samples.now - before
        self.counters["steps"] += steps
        for name in ("row_steps", "sampled"):
            self.counters[name] += steps * batch.n
        self.samples.counted = self.samples.now
        return self._end()

    def _one(self) -> None:
        """A decode step of all running sequences by torch."""
        sequences, slots, device = self.batch.running, self.memory.slots, self.geometry.device
        state = self.batch.state[:, : len(sequences)]
        settings = [sequence.setting for sequence in sequences]
        if settings != self._settings:
            dtype = torch.float64 if self.geometry.dtype == torch.float64 else torch.float32
            self._sampling = SamplingBatch([sequence.request.sampling for sequence in sequences], device, dtype)
            self._settings = settings
        tokens, at = torch.from_numpy(state[[TOKEN, POSITION]][:, :, None]).to(device).unbind(0)  # [A, 1] each
        slot_numbers = None if self.kernels is None else torch.from_numpy(state[SLOT])
        reach = Reach(slots, at, min(slots.capacity, rounded(int(state[POSITION].max()) + 1)), slot_numbers)
        logits = self.forward(tokens, at, reach, True)
        assert logits is not None
        logits = logits if logits.dtype == torch.float64 else logits.float()
        uniform = torch.from_numpy(uniforms(state[STREAM].view(np.uint64), state[COUNT].view(np.uint64))).to(device)
        drawn = draw(logits, self._sampling, uniform, self.kernels)
        self.samples.add(drawn, sequences)
        state[TOKEN] = drawn.tokens
        state[[POSITION, COUNT]] += 1
        state[LEFT] -= 1

    def _check_last(self, steps: DecodeSteps) -> None:
        """Where the kernels' last step met logits that are NaN or infinite, which they leave with the entropy NaN, draw its tokens through torch."""
        n = self.batch.n
        if not np.isnan(self.samples.last(n)[1]).any():
            return
        sampling = SamplingBatch([sequence.request.sampling for sequence in self.batch.running], self.geometry.device, torch.float32)
        drawn = draw(steps.logits[:n], sampling, torch.from_numpy(steps.uniform[:n]))
        self.samples.replace_last(drawn)
        self.batch.state[TOKEN, :n] = drawn.tokens

    def _end(self) -> int:
        """End the sequences that end after this step; returns how many groups are answered."""
        batch = self.batch
        tokens = self.samples.last(batch.n)[0]
        rows = batch.ended(tokens)
        finishes = self._finishes(tokens)
        if any(future.done() for future in batch.futures):
            rows = list(range(batch.n))
        elif finishes:
            rows = sorted({*rows, *finishes})
        ended: list[tuple[Sequence, str | None]] = []
        for row in rows:
            ending = batch.rows[row]
            assert ending is not None
            reason = finishes.get(row) or ("eos" if int(tokens[row]) in ending.ids else None)
            if reason is not None or batch.state[LEFT, row] <= 0 or ending.over:
                ended.append((ending, reason))
        columns = self.samples.read([sequence for sequence, _ in ended])
        return sum(self._finish(*end, *read) for end, read in zip(ended, columns, strict=True))

    def _finishes(self, tokens: np.ndarray) -> dict[int, str]:
        """Rows of which their `until` says that the text ends; one that fails ends what its caller asked for, with the error, and nothing else."""
        finishes: dict[int, str] = {}
        for sequence in self.batch.asking:
            if sequence.over:
                continue
            sequence.tokens.append(int(tokens[sequence.row]))
            assert sequence.until is not None
            try:
                finish = sequence.until(sequence.tokens)
            except Exception as error:
                sequence.group.fail(error)
                continue
            if finish is not None:
                finishes[sequence.row] = finish
        return finishes

    def _finish(self, sequence: Sequence, finish: str | None, tokens: array[int], columns: list[array[float]]) -> bool:
        """The sequence leaves; whether its group is answered now, or wants no answer any more."""
        group = sequence.group
        self.allocator.release(sequence, sequence.prefix + tuple(tokens[:-1]))
        self.batch.leave(sequence)
        if not sequence.over:
            group.segments[sequence.index] = self._segment(sequence, tokens, columns, finish)
            group.left -= 1
            if group.left:
                return False
            group.future.set_result([segment for segment in group.segments if segment is not None])
        return True

    def _segment(self, sequence: Sequence, tokens: array[int], columns: list[array[float]], finish: str | None) -> Segment:
        """What is recorded of a sequence."""
        sampling, (logprobs, entropy, *rest) = sequence.request.sampling, columns
        kept = rest[0] if sampling.truncates else None
        temperature = rest[1] if callable(sampling.temperature) else float(sampling.temperature)
        return Segment(tokens, logprobs, finish, self.version, self.version, kept, entropy, temperature)
