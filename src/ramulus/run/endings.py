"""Whether answers end by themselves: a run in which they hardly ever do is told so, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ramulus.core.tree import Author, Tree

BY_THEMSELVES = ("eos", "answer", "stop")
LEAST = 0.05  # share of answers below which something is amiss
SEEN = 20  # answers before anything is said


@dataclass
class Endings:
    """Counts the answers of a run since it was started."""

    names: tuple[str, ...] = ()  # of the tokens that end an answer
    told: bool = False
    ended: int = 0
    seen: int = 0

    def __call__(self, trees: Sequence[Tree], step: int, limit: int) -> str | None:
        """After the trees of a step: the sentence to say, or None."""
        finishes = [leaf.finish for tree in trees for leaf in tree.leaves() if leaf.author is Author.POLICY]
        self.ended += sum(finish in BY_THEMSELVES for finish in finishes)
        self.seen += sum(finish in (*BY_THEMSELVES, "length") for finish in finishes)
        if self.told or self.seen < SEEN or self.ended >= LEAST * self.seen:
            return None
        self.told = True
        return (
            f"only {self.ended} of {self.seen} answers have ended by themselves up to step {step}, the others were cut off at "
            f"response_limit={limit}: raise it, or look whether this model ends its turns with {' or '.join(self.names)}, which ends an answer here"
        )
