"""A radix trie over token prefixes that holds what the model computed for them, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Cut = Callable[[int, int], Tensor]
"""Copies the KV of tokens [start, stop) of the sequence at hand: [layers, 2, heads, stop - start, dim]."""


@dataclass(eq=False, slots=True)
class Twig:
    """A run of tokens and its KV; without a chunk it is a ghost: known, but dropped."""

    tokens: tuple[int, ...]  # [n]
    chunk: Tensor | None  # [layers, 2, heads, n, dim]
    parent: Twig | None
    children: dict[int, Twig] = field(default_factory=dict)  # by first token


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix, by bisection over slice comparisons."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class Trie:
    """KV by token prefix. Least recently used leaf chunks go first; use is counted, never timed.

    `budget`: bytes; a chunk that does not fit even when everything else is dropped is left out. A twig that holds a chunk has
    ancestors that hold theirs, so a match is always a run from the first token on.
    """

    def __init__(self, token_bytes: int, budget: int = 0) -> None:
        self.token_bytes, self.budget = token_bytes, budget
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.root = Twig((), None, None)
        self.used = 0  # bytes
        self.recent: OrderedDict[Twig, None] = OrderedDict()  # least recently used first, children before parents

    def match(self, prefix: tuple[int, ...]) -> tuple[list[tuple[Tensor, int]], int, int]:
        """The longest known run at the start of `prefix`.

        Returns the chunks to copy with how many tokens of each, the number of tokens they hold, and the number of tokens that
        were known at some time (those beyond the first number have been dropped).
        """
        found: list[tuple[Tensor, int]] = []
        path: list[Twig] = []
        held = known = 0
        twig = self.root.children.get(prefix[0]) if prefix else None
        while twig is not None:
            n = common(twig.tokens, prefix[known : known + len(twig.tokens)])
            known += n
            if twig.chunk is not None:
                held += n
                found.append((twig.chunk, n))
                path.append(twig)
            if n < len(twig.tokens) or known == len(prefix):
                break
            twig = twig.children.get(prefix[known])
        self._touch(path)
        return found, held, known

    def insert(self, prefix: tuple[int, ...], cut: Cut) -> None:
        """Keep the KV of `prefix`, copying with `cut` only what is not held yet."""
        twig, at = self.root, 0
        path: list[Twig] = []
        while at < len(prefix):
            child = twig.children.get(prefix[at])
            if child is None:
                child = Twig(prefix[at:], None, twig)
                twig.children[prefix[at]] = child
            n = common(child.tokens, prefix[at : at + len(child.tokens)])
            if n < len(child.tokens):
                child = self._split(child, n)
            twig, at = child, at + n
            path.append(twig)
        self._touch(path)
        self._fill(path, cut)
        self._touch(path)

    def shrink(self, budget: int) -> None:
        """Set the budget in bytes and drop what no longer fits."""
        self.budget = budget
        while self.used > budget:
            self._drop(next(iter(self.recent)))

    def _fill(self, path: list[Twig], cut: Cut) -> None:
        at = 0
        on_path = set(path)
        for twig in path:
            n = len(twig.tokens)
            if twig.chunk is None:
                size = n * self.token_bytes
                while self.used + size > self.budget and self.recent:
                    oldest = next(iter(self.recent))
                    if oldest in on_path:
                        return
                    self._drop(oldest)
                if self.used + size > self.budget:
                    return
                twig.chunk = cut(at, at + n)
                self.used += size
                self.recent[twig] = None
                self._touch(path)
            at += n

    def _drop(self, twig: Twig) -> None:
        assert twig.chunk is not None
        self.used -= len(twig.tokens) * self.token_bytes
        twig.chunk = None
        del self.recent[twig]

    def _touch(self, path: list[Twig]) -> None:
        """Make a path the most recently used, its end before its start."""
        for twig in reversed(path):
            if twig.chunk is not None:
                self.recent.move_to_end(twig)

    def _split(self, twig: Twig, n: int) -> Twig:
        """Put a head with the first `n` tokens above `twig`; both get chunks of their own, so that a dropped half frees memory."""
        assert twig.parent is not None
        head = Twig(twig.tokens[:n], None, twig.parent)
        twig.parent.children[head.tokens[0]] = head
        if twig.chunk is not None:
            head.chunk, twig.chunk = twig.chunk[..., :n, :].clone(), twig.chunk[..., n:, :].clone()
            self.recent[head] = None
        twig.tokens = twig.tokens[n:]
        twig.parent = head
        head.children = {twig.tokens[0]: twig}
        return head
