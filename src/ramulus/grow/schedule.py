"""How many prompts to draw next, and which trees are worth a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ramulus.core.share import at_least
from ramulus.core.tree import Author, Tree

State = dict[str, Any]
"""Plain JSON that the trainer hands in and takes back, and keeps in every checkpoint."""


class Schedule(Protocol):
    """Decides, after every draw, whether to draw more prompts for this step or to train on what was kept.

    Example:
        >>> from ramulus import Dynamic, Schedule
        >>> schedule: Schedule = Dynamic(prompts=8, draws=2)
        >>> [schedule([], draws, {})[0] for draws in range(3)]  # prompts to draw where no tree was kept
        [8, 8, 0]
    """

    @property
    def expand(self) -> Callable[[Sequence[Tree], State], tuple[list[set[int]], State]] | None:
        """(trees, state) -> (ids of the leaves to grow from, of each tree; state): asked once a draw, after the first round of growth, when
        every path is graded. None grows from whatever the branching rule says. See grow/adaptive.py."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the node signals that `expand` reads."""
        ...

    @property
    def prompts(self) -> int:
        """Trees wanted for one training step."""
        ...

    @property
    def draws(self) -> int:
        """How often it draws for one step, at most; one that says nothing draws once."""
        return 1

    @property
    def most_trees(self) -> int | None:
        """Trees that a step trains on at most; None where nothing bounds them."""
        return None

    @property
    def most_drawn(self) -> int | None:
        """Trees that are grown for a step at most; None: those that it trains on, once for each draw."""
        return None

    def asked(self, state: State) -> int:
        """Trees wanted for the step that the state leads to; an adaptive schedule changes its mind from step to step."""
        ...

    def __call__(self, kept: Sequence[Tree], draws: int, state: State) -> tuple[int, State]:
        """(trees kept so far, draws so far, state) -> (prompts to draw now, state); 0 means go and train."""
        ...

    def keep(self, tree: Tree) -> bool:
        """Whether a grown and graded tree takes part in the step."""
        ...


@dataclass(frozen=True)
class Fixed:
    """`prompts` prompts a step, every tree kept.

    Example:
        >>> from ramulus import Fixed
        >>> Fixed(prompts=8)([], 0, {})[0]
        8
    """

    prompts: int

    expand: ClassVar[None] = None
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ValueError(f"a step needs at least 1 prompt, got prompts={self.prompts}")

    def asked(self, state: State) -> int:
        return self.prompts

    def __call__(self, kept: Sequence[Tree], draws: int, state: State) -> tuple[int, State]:
        return (self.prompts if draws == 0 else 0), state

    @property
    def most_trees(self) -> int:
        """Trees of every step."""
        return self.prompts

    def keep(self, tree: Tree) -> bool:
        return True


@dataclass(frozen=True)
class Dynamic:
    """DAPO's dynamic sampling (arXiv 2503.14476): draws again in place of trees whose paths are all right or all wrong.

    At most `draws` draws a step; then the step trains on the trees it has, fewer than `prompts`, even none (no update
    that step). Nothing is filled up: a tree without signal adds no gradient. A draw asks for `oversample` times the trees
    still missing, so with more than 1 there may be more than `prompts` in the end; the trainer takes the first in drawn
    order.

    Example:
        >>> from ramulus import Dynamic
        >>> Dynamic(prompts=512, draws=3)([], 0, {})[0]
        512
    """

    prompts: int
    draws: int = 3
    oversample: float = 1.0

    expand: ClassVar[None] = None
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.draws < 1:
            raise ValueError(f"Dynamic needs prompts and draws of at least 1, got {self.prompts} and {self.draws}")
        if not 1 <= self.oversample < math.inf:
            raise ValueError(f"Dynamic's oversample must be at least 1, got {self.oversample}")

    def asked(self, state: State) -> int:
        return self.prompts

    def __call__(self, kept: Sequence[Tree], draws: int, state: State) -> tuple[int, State]:
        missing = max(self.prompts - len(kept), 0)
        return (at_least(self.oversample, missing) if draws < self.draws else 0), state

    @property
    def most_trees(self) -> int:
        """Trees that a step trains on, where it has them."""
        return self.prompts

    @property
    def most_drawn(self) -> int:
        """Trees that a step grows where every draw leaves all of them missing."""
        return self.draws * at_least(self.oversample, self.prompts)

    def keep(self, tree: Tree) -> bool:
        """Whether the policy's graded paths differ in correctness, or in reward where one has none; a lone path is kept."""
        paths = [leaf for leaf in tree.leaves() if leaf.author is Author.POLICY]
        graded = [leaf for leaf in paths if leaf.reward is not None]
        if len(paths) <= 1:
            return len(graded) == len(paths)
        by_answer = all("correct" in leaf.verdict for leaf in graded)
        return len({leaf.verdict["correct"] if by_answer else leaf.reward for leaf in graded}) > 1
