"""LUFFY (arXiv 2504.14945): a demonstration in the group of every question, its probabilities shaped by p / (p + 0.1)."""

from dataclasses import replace

from ramulus.core.tree import Author
from ramulus.grow.branching import Star
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import ConstantLength, Mix, Term, TokenMean
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.objective.shaped_reference import Shaped
from ramulus.recipes.hpt import PUBLISHED, SMALL
from ramulus.run.config.recipe import AdamW, Run


def mix(length: int) -> Mix:
    """Token sums over a fixed number of tokens, demonstration and rollouts in one group; the entropy bonus is a mean over all tokens, as in the
    code.
    """
    mixed = Estimator(Everything(), PerAuthor(Behavior(), Shaped(0.1)), GroupMean(std=False, over="all"))
    return Mix((Term(mixed, (Author.POLICY, Author.EXPERT), ConstantLength(length)),), entropy_bonus=0.001, normaliser=TokenMean())


def recipe() -> Run:
    """Published settings: 7 rollouts and 1 demonstration, no clip, no deviation, learning rate 1e-6."""
    return Run(
        name="luffy",
        branching=Star(7),
        mix=mix(PUBLISHED["response_limit"]),
        optimizer=AdamW(lr=1e-6, weight_decay=0.01),
        **PUBLISHED,
    )


def small() -> Run:
    """LUFFY on the quickstart's task, from its supervised model, with a teacher that is right, on a CPU."""
    return replace(recipe(), mix=mix(3072), **SMALL)  # any length would do: AdamW takes out what scales all gradients
