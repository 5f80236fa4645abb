"""How much work a step is at most: trees, paths and tokens, from the recipe alone."""

from __future__ import annotations

from dataclasses import dataclass

from ramulus.core.recipe_part import with_defaults
from ramulus.grow.branching import BranchingOptions, innermost
from ramulus.grow.schedule import Schedule
from ramulus.run.config.recipe import Run

USUAL_PATHS = 8  # of a tree, where its branching rule does not say


@dataclass(frozen=True)
class Work:
    """The work of one step at most; tokens as if every path ran to response_limit and shared its prompt alone."""

    trees: int
    first: int  # trees of the first step, from which a schedule may go on to fewer or more
    paths: int  # of a tree, demonstrations among them
    prompt: int  # tokens, prompt_limit
    response: int  # tokens, response_limit
    assumed: tuple[str, ...] = ()  # what no part of the recipe says, in sentences

    @property
    def spelled(self) -> str:
        """Trees and paths, in words."""
        later = f" (later up to {self.trees} trees)" if self.trees > self.first else ""
        return f"{self.first} trees of {self.paths} paths{later}"

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
    trees, paths = with_defaults(run.schedule, Schedule).most_trees, with_defaults(run.branching, BranchingOptions).most_paths()
    first, assumed = run.schedule.asked({}), []
    if trees is None:
        assumed.append(
            f"{type(run.schedule).__name__} does not bound the trees of a step: {first} were assumed, as in the first one "
            "(schedule.batch.most bounds those of Adaptive, most_trees those of a schedule of your own)"
        )
    if paths is None:
        rule = type(innermost(run.branching)).__name__
        assumed.append(f"{rule} does not say how many paths a tree has at most: {USUAL_PATHS} were assumed (docs/extend.md: most_paths)")
    trees, paths = first if trees is None else trees, USUAL_PATHS if paths is None else paths
    return Work(trees, first, max(1, paths + run.demonstrations), run.prompt_limit, run.response_limit, tuple(assumed))
