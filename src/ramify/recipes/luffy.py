"""LUFFY (arXiv 2504.14945): a demonstration in the group of every question, its probabilities shaped by p / (p + 0.1)."""

from dataclasses import replace

from ramify.core.tree import Author
from ramify.grow.branching import Star
from ramify.learn.advantage import GroupMean
from ramify.learn.authors import PerAuthor
from ramify.learn.estimator import Estimator
from ramify.learn.mask import Everything
from ramify.learn.mix import ConstantLength, Mix, Term
from ramify.learn.reference import Behavior
from ramify.learn.shaped import Shaped
from ramify.recipes.hpt import PUBLISHED, SMALL
from ramify.run.recipe import AdamW, Run


def recipe() -> Run:
    """Published settings: 7 rollouts and 1 demonstration, no clip, no deviation, learning rate 1e-6."""
    mixed = Estimator(Everything(), PerAuthor(Behavior(), Shaped(0.1)), GroupMean(std=False, over="all"))
    length = ConstantLength(PUBLISHED["response_limit"])
    mix = Mix((Term(mixed, (Author.POLICY, Author.EXPERT), length),), entropy_bonus=0.001)
    return Run(name="luffy", branching=Star(7), mix=mix, optimizer=AdamW(lr=1e-6, weight_decay=0.01), **PUBLISHED)


def small() -> Run:
    """LUFFY on the quickstart's task, from its supervised model, with a teacher that is right, on a CPU."""
    return replace(recipe(), **SMALL)
