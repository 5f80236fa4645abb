"""A radix tree over token prefixes that holds what the model computed for them, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

_Cut = Callable[[int, int], Tensor]
"""Copies the KV of tokens [start, stop) of the sequence at hand: [layers, 2, heads, stop - start, dim]."""


@dataclass(eq=False, slots=True)
class RadixNode:
    """A run of tokens and its KV; without a chunk it is a ghost: known, but dropped."""

    tokens: tuple[int, ...]  # [n]
    chunk: Tensor | None  # [layers, 2, heads, n, dim]
    parent: RadixNode | None
    children: dict[int, RadixNode] = field(default_factory=dict)  # by first token


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


class RadixTree:
    """KV by token prefix. Least recently used leaf chunks go first; use is counted, never timed.

    `budget`: bytes, 0 until `shrink` sets it; a chunk that does not fit even when everything else is dropped is left out. A node that
    holds a chunk has ancestors that hold theirs, so a match is always a run from the first token on.
    """

    def __init__(self, token_bytes: int) -> None:
        self.token_bytes, self.budget = token_bytes, 0
        self.clear()

    def clear(self) -> None:
        """Drop all chunks and the prefixes known of before."""
        self.root = RadixNode((), None, None)
        self.used = 0  # bytes
        self.recent: OrderedDict[RadixNode, None] = OrderedDict()  # least recently used first, children before parents

    def match(self, prefix: tuple[int, ...]) -> tuple[list[tuple[Tensor, int]], int, int]:
        """The longest known run at the start of `prefix`.

        Returns the chunks to copy with how many tokens of each, the number of tokens they hold, and the number of tokens that
        were known at some time (those beyond the first number have been dropped).
        """
        pieces: list[tuple[Tensor, int]] = []
        path: list[RadixNode] = []
        held = known = 0
        node = self.root.children.get(prefix[0]) if prefix else None
        while node is not None:
            n = common(node.tokens, prefix[known : known + len(node.tokens)])
            known += n
            if node.chunk is not None:
                held += n
                pieces.append((node.chunk, n))
                path.append(node)
            if n < len(node.tokens) or known == len(prefix):
                break
            node = node.children.get(prefix[known])
        self._touch(path)
        return pieces, held, known

    def insert(self, prefix: tuple[int, ...], cut: _Cut) -> None:
        """Keep the KV of `prefix`, copying with `cut` only what is not held yet."""
        node, at = self.root, 0
        path: list[RadixNode] = []
        while at < len(prefix):
            child = node.children.get(prefix[at])
            if child is None:
                child = RadixNode(prefix[at:], None, node)
                node.children[prefix[at]] = child
            n = common(child.tokens, prefix[at : at + len(child.tokens)])
            if n < len(child.tokens):
                child = self._split(child, n)
            node, at = child, at + n
            path.append(node)
        self._touch(path)
        self._fill(path, cut)
        self._touch(path)

    def shrink(self, budget: int) -> None:
        """Set the budget in bytes and drop what no longer fits."""
        self.budget = budget
        while self.used > budget:
            self._drop(next(iter(self.recent)))

    def _fill(self, path: list[RadixNode], cut: _Cut) -> None:
        at = 0
        on_path = set(path)
        for node in path:
            n = len(node.tokens)
            if node.chunk is None:
                size = n * self.token_bytes
                while self.used + size > self.budget and self.recent:
                    oldest = next(iter(self.recent))
                    if oldest in on_path:
                        return
                    self._drop(oldest)
                if self.used + size > self.budget:
                    return
                node.chunk = cut(at, at + n)
                self.used += size
                self.recent[node] = None
                self._touch(path)
            at += n

    def _drop(self, node: RadixNode) -> None:
        assert node.chunk is not None
        self.used -= len(node.tokens) * self.token_bytes
        node.chunk = None
        del self.recent[node]

    def _touch(self, path: list[RadixNode]) -> None:
        """Make a path the most recently used, its end before its start."""
        for node in reversed(path):
            if node.chunk is not None:
                self.recent.move_to_end(node)

    def _split(self, node: RadixNode, n: int) -> RadixNode:
        """Put a head with the first `n` tokens above `node`; both get chunks of their own, so that a dropped half frees memory."""
        assert node.parent is not None
        head = RadixNode(node.tokens[:n], None, node.parent)
        node.parent.children[head.tokens[0]] = head
        if node.chunk is not None:
            head.chunk, node.chunk = node.chunk[..., :n, :].clone(), node.chunk[..., n:, :].clone()
            self.recent[head] = None
        node.tokens = node.tokens[n:]
        node.parent = head
        head.children = {node.tokens[0]: node}
        return head
