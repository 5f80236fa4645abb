"""What was sampled, step by step; a sequence's tokens are read out of it once, when it has ended."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np

from ramulus.engine.local.sampling import Drawn
from ramulus.engine.local.sequence import Sequence

_STEPS = 256  # that there is room for at first
NUMBERS = ("logprobs", "entropy", "kept", "temperature")


class Samples:
    """The draws of the last steps by row of the batch; sequences know which row they had during which of them.

    tokens [steps, most] and numbers [4, steps, most] (log-probs, entropies, kept mass, temperatures; the last two only of sequences that are not
    plain); `most` rows at once, and the steps are those from `first` on. One is kept as long as some sequence that was in it, or in an earlier
    one, has not ended: what the longest needs.
    """

    def __init__(self, most: int) -> None:
        self.first = self.now = 0  # the first step that is there, and the next one
        self.tokens = np.empty((_STEPS, most), dtype=np.int64)
        self.numbers = np.empty((len(NUMBERS), _STEPS, most))

    def room(self, steps: int, sequences: Iterable[Sequence | None]) -> int:
        """Make room for so many steps more; returns where the next one goes."""
        size = len(self.tokens)
        if self.now - self.first + steps > size:
            needed = min((sequence.began for sequence in sequences if sequence is not None), default=self.now)
            held = self.now - needed
            if held + steps > size // 2:
                size = 2 * (held + steps)
            tokens = np.empty((size, self.tokens.shape[1]), dtype=np.int64)
            numbers = np.empty((len(NUMBERS), size, self.tokens.shape[1]))
            tokens[:held] = self.tokens[needed - self.first : self.now - self.first]
            numbers[:, :held] = self.numbers[:, needed - self.first : self.now - self.first]
            self.tokens, self.numbers, self.first = tokens, numbers, needed
        return self.now - self.first

    def add(self, drawn: Drawn, sequences: Iterable[Sequence | None]) -> None:
        """One step of the first rows."""
        self._write(self.room(1, sequences), drawn)
        self.now += 1

    def replace_last(self, drawn: Drawn) -> None:
        """What the last step really drew."""
        self._write(self.now - 1 - self.first, drawn)

    def last(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and entropies [n] of the first rows in the last step."""
        at = self.now - 1 - self.first
        return self.tokens[at, :n], self.numbers[1, at, :n]

    def _write(self, at: int, drawn: Drawn) -> None:
        n = len(drawn.tokens)
        self.tokens[at, :n] = drawn.tokens
        for i, name in enumerate(NUMBERS):
            self.numbers[i, at, :n] = getattr(drawn, name)

    def tokens_of(self, sequence: Sequence) -> array[int]:
        """Its tokens."""
        spans = [self.tokens[start - self.first : stop - self.first, row] for row, start, stop in sequence.rows(self.now)]
        whole = spans[0].astype(np.int32) if len(spans) == 1 else np.concatenate(spans, dtype=np.int32)
        return array("i", whole.tobytes())

    def columns_of(self, sequence: Sequence) -> list[array[float]]:
        """Log-probs and entropies of its tokens; of one that is not plain also kept mass and temperatures."""
        count = 2 if sequence.plain else len(NUMBERS)
        spans = [self.numbers[:count, start - self.first : stop - self.first, row] for row, start, stop in sequence.rows(self.now)]
        whole = spans[0].astype(np.float32) if len(spans) == 1 else np.concatenate(spans, axis=1, dtype=np.float32)
        return [array("f", column.tobytes()) for column in whole]
