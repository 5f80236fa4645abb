"""Growing again from finished paths when a tree has too few: which are seeds, where they are cut (arXiv 2508.17445)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar

from ramulus.core.tree import Node
from ramulus.grow.allocation import logprobs, softmax
from ramulus.grow.branching import own_length

Seeds = Callable[[Sequence[Node], random.Random, int], list[Node]]
"""(finished paths, dice, segment length) -> the paths to grow from again, in order; none restarts from the prompt."""

_T = TypeVar("_T")

PRIORITY = {"answer": 7, "eos": 5, None: 4, "length": 3, "repetition": 2}  # None: out of depth; anything else 1


@dataclass(frozen=True)
class Answered:
    """Only paths that ended with an answer or EOS, shuffled: `soft_boxed_and_eos`, the published choice.

    Example:
        >>> import random
        >>> from ramulus import Author, Answered, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> ends = [tree.add(tree.root, [2] * n, Author.POLICY, finish=end) for n, end in ((8, "answer"), (9, "length"), (3, "eos"))]
        >>> sorted(leaf.finish for leaf in Answered()(ends, random.Random(0), 4))
        ['answer', 'eos']
    """

    def __call__(self, finished: Sequence[Node], dice: random.Random, segment: int) -> list[Node]:
        return shuffled([leaf for leaf in finished if leaf.finish in ("answer", "eos")], dice)


@dataclass(frozen=True)
class FinishedFirst:
    """All paths, better ends first: a random order weighted by PRIORITY; with `strict` sorted by it, ties at random.

    Example:
        >>> import random
        >>> from ramulus import Author, FinishedFirst, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> ends = [tree.add(tree.root, [2] * n, Author.POLICY, finish=end) for n, end in ((8, "answer"), (9, "length"), (3, "eos"))]
        >>> [leaf.finish for leaf in FinishedFirst(strict=True)(ends, random.Random(0), 4)]
        ['answer', 'eos', 'length']
    """

    strict: bool = False

    def __call__(self, finished: Sequence[Node], dice: random.Random, segment: int) -> list[Node]:
        rank = [PRIORITY.get(leaf.finish, 1) for leaf in finished]
        if not self.strict:
            return by_weight(finished, [float(r) for r in rank], dice)
        order = sorted(shuffled(list(range(len(rank))), dice), key=lambda i: -rank[i])
        return [finished[i] for i in order]


@dataclass(frozen=True)
class Anyone:
    """All paths, shuffled: `random_all`.

    Example:
        >>> import random
        >>> from ramulus import Author, Anyone, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> ends = [tree.add(tree.root, [2] * n, Author.POLICY, finish=end) for n, end in ((8, "answer"), (9, "length"), (3, "eos"))]
        >>> sorted(leaf.finish for leaf in Anyone()(ends, random.Random(0), 4))
        ['answer', 'eos', 'length']
    """

    def __call__(self, finished: Sequence[Node], dice: random.Random, segment: int) -> list[Node]:
        return shuffled(list(finished), dice)


@dataclass(frozen=True)
class LongerFirst:
    """All paths in a random order weighted by their length.

    Example:
        >>> import random
        >>> from ramulus import Author, LongerFirst, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> ends = [tree.add(tree.root, [2] * n, Author.POLICY, finish=end) for n, end in ((8, "answer"), (9, "length"), (3, "eos"))]
        >>> sorted(leaf.finish for leaf in LongerFirst()(ends, random.Random(0), 4))
        ['answer', 'eos', 'length']
    """

    def __call__(self, finished: Sequence[Node], dice: random.Random, segment: int) -> list[Node]:
        return by_weight(finished, [float(own_length(leaf)) for leaf in finished], dice)


@dataclass(frozen=True)
class LongAnswered:
    """Paths that ended with an answer and have at least `windows` windows of tokens, shuffled: `boxed_ge_window_K`.

    Example:
        >>> import random
        >>> from ramulus import Author, LongAnswered, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> ends = [tree.add(tree.root, [2] * n, Author.POLICY, finish=end) for n, end in ((8, "answer"), (9, "length"), (3, "eos"))]
        >>> [leaf.finish for leaf in LongAnswered(windows=2)(ends, random.Random(0), 4)], LongAnswered(windows=3)(ends, random.Random(0), 4)
        (['answer'], [])
    """

    windows: int
    window: int | None = None  # tokens; None takes the segment length

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"LongAnswered needs at least 1 window, got {self.windows}: Answered() asks for no length")
        check_window(self.window)

    def __call__(self, finished: Sequence[Node], dice: random.Random, segment: int) -> list[Node]:
        least = self.windows * (self.window or segment)
        return shuffled([leaf for leaf in finished if leaf.finish == "answer" and own_length(leaf) >= least], dice)


Cut = Callable[[Node, random.Random, int], int]
"""(finished path, dice, segment length) -> how many of the policy's own tokens to keep, 0 (none) to `own_length` - 1."""


class CutOptions(Protocol):
    """What a cut may say of itself."""

    one: bool = False  # whether it is asked for a single seed a round


@dataclass(frozen=True)
class RandomCut:
    """A uniformly random earlier window boundary, the prompt's end included: the published choice.

    `window` tokens (None: the segment length, so that cuts fall on segment ends); `most` > 0 goes back at most so many.

    Example:
        >>> import random
        >>> from ramulus import Author, RandomCut, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2] * 6, Author.POLICY, logprobs=[-0.1, -0.1, -3.0, -0.1, -0.1, -0.1], finish="eos")
        >>> {RandomCut(window=4)(leaf, random.Random(seed), 4) for seed in range(20)}
        {0, 4}
    """

    window: int | None = None
    most: int = 0

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.most < 0:
            raise ValueError(f"RandomCut's most must be >= 0 (0: any number of windows back), got {self.most}")

    def __call__(self, leaf: Node, dice: random.Random, segment: int) -> int:
        window = self.window or segment
        blocks = math.ceil(own_length(leaf) / window)
        back = dice.randint(1, min(self.most, blocks) if self.most else blocks)
        return (blocks - back) * window


@dataclass(frozen=True)
class BlockCut:
    """The start of a block of `size` tokens, drawn by softmax of -+ its mean log-prob.

    `favour` low ones (`block`) or high ones (`inverse_block`). A path shorter than `window` (None: the segment length) restarts from the prompt.

    Example:
        >>> import random
        >>> from ramulus import Author, BlockCut, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2] * 6, Author.POLICY, logprobs=[-0.1, -0.1, -3.0, -0.1, -0.1, -0.1], finish="eos")
        >>> {BlockCut(size=3, window=4)(leaf, random.Random(seed), 4) for seed in range(20)}
        {0, 3}
    """

    size: int = 128
    favour: Literal["low", "high"] = "low"
    window: int | None = None

    def __post_init__(self) -> None:
        check_window(self.window)
        if self.size < 1:
            raise ValueError(f"BlockCut's size must be at least 1 token, got {self.size}")
        if self.favour not in ("low", "high"):
            raise ValueError(f"BlockCut's favour is 'low' or 'high', got {self.favour!r}")

    def __call__(self, leaf: Node, dice: random.Random, segment: int) -> int:
        logps = logprobs(leaf)
        if len(logps) < (self.window or segment):
            return 0
        blocks = [logps[i : i + self.size] for i in range(0, len(logps), self.size)]
        sign = -1.0 if self.favour == "low" else 1.0
        weights = softmax([sign * math.fsum(block) / len(block) for block in blocks])
        return dice.choices(range(len(blocks)), weights=weights)[0] * self.size


@dataclass(frozen=True)
class WorstTokenCut:
    """Just before the token with the lowest log-prob (`min_logprob_token`), the first of them; short paths as in BlockCut.

    Example:
        >>> import random
        >>> from ramulus import Author, WorstTokenCut, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2] * 6, Author.POLICY, logprobs=[-0.1, -0.1, -3.0, -0.1, -0.1, -0.1], finish="eos")
        >>> WorstTokenCut()(leaf, random.Random(0), 4)
        2
    """

    window: int | None = None

    def __post_init__(self) -> None:
        check_window(self.window)

    def __call__(self, leaf: Node, dice: random.Random, segment: int) -> int:
        logps = logprobs(leaf)
        return 0 if len(logps) < (self.window or segment) else logps.index(min(logps))


@dataclass(frozen=True)
class FromStart:
    """Always from the prompt, with one seed a round.

    Example:
        >>> import random
        >>> from ramulus import Author, FromStart, Task, Tree
        >>> tree = Tree.plant(Task("t", (1,), "t"))
        >>> leaf = tree.add(tree.root, [2] * 6, Author.POLICY, logprobs=[-0.1, -0.1, -3.0, -0.1, -0.1, -0.1], finish="eos")
        >>> FromStart()(leaf, random.Random(0), 4)
        0
    """

    one: ClassVar[bool] = True

    def __call__(self, leaf: Node, dice: random.Random, segment: int) -> int:
        return 0


def check_window(window: int | None) -> None:
    """Raise ValueError for a window that no cut can use."""
    if window is not None and window < 1:
        raise ValueError(f"a fallback window must be at least 1 token, got {window}: None takes the segment length")


def shuffled(items: list[_T], dice: random.Random) -> list[_T]:
    """A shuffled copy of the items, which stay as they are."""
    return dice.sample(items, len(items))


def by_weight(leaves: Sequence[Node], weights: Sequence[float], dice: random.Random) -> list[Node]:
    """A permutation drawn without replacement by weight: the Gumbel top-k draw, done with exponential clocks."""
    clocks = [-math.log(1.0 - dice.random()) / max(weight, 1e-9) for weight in weights]
    return [leaves[i] for i in sorted(range(len(leaves)), key=clocks.__getitem__)]
