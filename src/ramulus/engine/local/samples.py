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
        self.counted = 0  # steps that the engine's counters have in them
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

    def read(self, ended: list[Sequence]) -> list[tuple[array[int], list[array[float]]]]:
        """Of each sequence its tokens, and their log-probs and entropies; of one that is not plain also kept mass and temperatures.

        Those that were in one row over the same steps are read together.
        """
        alike: dict[tuple[int, int, bool], list[int]] = {}
        for place, sequence in enumerate(ended):
            alike.setdefault((sequence.since, place if sequence.spans else -1, sequence.plain), []).append(place)
        columns: dict[int, tuple[array[int], list[array[float]]]] = {}
        for (_, _, plain), places in alike.items():
            rows, count = [ended[place].row for place in places], 2 if plain else len(NUMBERS)
            spans = [(slice(start - self.first, stop - self.first), row) for row, start, stop in ended[places[0]].rows(self.now)]
            cuts = [(steps, [row]) for steps, row in spans[:-1]] + [(spans[-1][0], rows)]
            tokens = np.concatenate([self.tokens[cut] for cut in cuts], dtype=np.int32).T.copy()
            numbers = np.concatenate([self.numbers[:count, *cut] for cut in cuts], axis=1, dtype=np.float32).transpose(2, 0, 1).copy()
            for place, line, block in zip(places, tokens, numbers, strict=True):
                columns[place] = array("i", line.tobytes()), [array("f", column.tobytes()) for column in block]
        return [columns[place] for place in range(len(ended))]
