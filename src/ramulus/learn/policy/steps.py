"""Reasoning steps: where a response is cut, from token ids alone (arXiv 2509.26628, appendix; the released rules)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ramulus.core.tree import Author, Node, Tree
from ramulus.learn.batch.layout import column_of

LEVELS = 3  # double separators, single ones, every token

Texts = Callable[[list[list[int]]], list[str]]
"""Token id lists -> their texts, special tokens kept."""

Marked = tuple[Node, str, Sequence[float]]
"""A node, the name of a signal, and one number for each of the node's tokens."""


@dataclass(frozen=True)
class Separators:
    """Token ids that close a step, and the one that closes the thinking.

    `double` ids where the response has one of them, else `single` ids, else every token is a step of its own.
    """

    double: frozenset[int] = frozenset()
    single: frozenset[int] = frozenset()
    think_end: int | None = None

    def level(self, response: Iterable[int]) -> int:
        """Which rule a response is cut by: 0 double separators, 1 single ones, 2 every token."""
        held = set(response)
        return 0 if held & self.double else 1 if held & self.single else 2

    def closes(self, tokens: Sequence[int], level: int) -> np.ndarray:
        """[L] bool: does a step end just after this token, by the rule of a level?"""
        if level == 2:
            return np.ones(len(tokens), dtype=bool)
        ids = self.double if level == 0 else self.single
        return np.fromiter((token in ids for token in tokens), dtype=bool, count=len(tokens))


@dataclass(frozen=True)
class Steps:
    """The steps of one response: where each begins, the length of it all, and the step that holds the last think end."""

    starts: list[int] = field(default_factory=list)  # [S], offsets in the response
    length: int = 0
    think_end: int | None = None


def segment(response: Sequence[int], separators: Separators) -> Steps:
    """Cut a response into steps: a separator belongs to the step it closes, what is left is the last step."""
    if not len(response):
        return Steps()
    closed = separators.closes(response, separators.level(response))
    starts = [0, *(np.flatnonzero(closed[:-1]) + 1).tolist()]
    ends = [at for at, token in enumerate(response) if token == separators.think_end]
    last = int(np.searchsorted(starts, ends[-1], side="right")) - 1 if ends else None
    return Steps(starts, len(response), last)


def separators_of(texts: Texts, size: int, think_end: int | None = None) -> Separators:
    """The separators of a vocabulary of `size` tokens: those whose text holds an empty line, those that hold a line end."""
    pieces = texts([[token] for token in range(size)])
    single = frozenset(token for token, text in enumerate(pieces) if "\n" in text)
    return Separators(frozenset(token for token in single if "\n\n" in pieces[token]), single, think_end)


def holding(texts: Texts, size: int, words: Sequence[str]) -> frozenset[int]:
    """The tokens whose text holds one of the words, in any case of letters."""
    pieces = texts([[token] for token in range(size)])
    return frozenset(token for token, text in enumerate(pieces) if any(word in text.lower() for word in words))


def marked_steps(tree: Tree, separators: Separators) -> Iterator[Marked]:
    """The signal "steps" of every node on the policy's paths: 1 where a step of some path begins."""
    return marked(tree, "steps", lambda response: segment(response, separators).starts)


def marked_after(tree: Tree, words: frozenset[int]) -> Iterator[Marked]:
    """The signal "concluded" of every node on the policy's paths: 1 after the first of these tokens."""

    def after(response: Sequence[int]) -> list[int]:
        first = next((at for at, token in enumerate(response) if token in words), len(response))
        return list(range(first + 1, len(response)))

    return marked(tree, "concluded", after)


def marked(tree: Tree, name: str, where: Callable[[Sequence[int]], list[int]]) -> Iterator[Marked]:
    """A signal that is 1 at these offsets of some path that shares the token, else 0."""
    nodes: dict[int, tuple[Node, np.ndarray]] = {}
    for leaf in tree.leaves():
        if leaf.author is not Author.POLICY:
            continue
        response = leaf.response()
        flags, at = np.zeros(len(response)), 0
        flags[np.array(where(response), dtype=np.int64)] = 1
        for node in leaf.line():
            if node.author is Author.PROMPT:
                continue
            here = flags[at : (at := at + len(node.tokens))]
            nodes[id(node)] = (node, np.maximum(here, nodes[id(node)][1]) if id(node) in nodes else here)
    return ((node, name, column_of(flags)) for node, flags in nodes.values())
