"""How much work a step is at most: trees, paths and tokens, from the recipe alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ramulus.run.config.recipe import Run


@dataclass(frozen=True)
class Work:
    """The work of one step at most; tokens as if every path ran to response_limit and shared its prompt alone."""

    trees: int
    paths: int  # of a tree, demonstrations among them
    prompt: int  # tokens, prompt_limit
    response: int  # tokens, response_limit

    @property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return self.prompt + self.response

    @property
    def tree_tokens(self) -> int:
        """Unique tokens of a tree."""
        return self.prompt + self.paths * self.response

    @property
    def tokens(self) -> int:
        """Unique tokens of all trees."""
        return self.trees * self.tree_tokens


def work_of(run: Run) -> Work:
    """The work of a step of this run."""
    batch = getattr(run.schedule, "batch", None)
    trees = getattr(run.schedule, "prompts", None) or max(getattr(batch, "first", 1), getattr(batch, "most", 0))
    return Work(int(trees), max(1, paths_of(run.branching) + run.demonstrations), run.prompt_limit, run.response_limit)


def paths_of(rule: Any) -> int:
    """Most paths of a tree that a branching rule grows, as its fields say; 8 for a rule of one's own that says nothing."""
    while hasattr(rule, "branching") and not isinstance(rule.branching, int):
        rule = rule.branching
    for name in ("n", "width"):
        if isinstance(getattr(rule, name, None), int):
            return int(getattr(rule, name))
    if hasattr(rule, "roots"):
        grown = 1 + rule.points * rule.branches
        return int(rule.roots * grown ** getattr(rule, "rounds", 1))
    return 8
