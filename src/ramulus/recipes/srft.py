"""SRFT (arXiv 2506.19767): imitation and reinforcement at once, each path weighed by how sure the policy is of it."""

from dataclasses import replace

from ramulus.core.tree import Author
from ramulus.grow.branching import Star
from ramulus.learn.advantage.baselines import Signed
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.leaf_weight import EntropyWeight
from ramulus.learn.objective.mask import Everything
from ramulus.learn.objective.mix import Mix, QuestionMean, Term
from ramulus.learn.objective.reference import Itself
from ramulus.learn.objective.shaped_reference import One
from ramulus.recipes.hpt import PUBLISHED, SMALL
from ramulus.run.config.recipe import AdamW, Run

EXPERT = (Author.EXPERT,)


def recipe() -> Run:
    """The paper's loss: SFT on the demonstration, RL on it against the whole group, and the policy's own rollouts; learning rate 1e-6."""
    imitate = Term(Estimator(Everything(), Itself(), Constant(), EntropyWeight(0.5, -1.0)), EXPERT, QuestionMean())
    compare = Term(Estimator(Everything(), One(), GroupMean(over="all")), EXPERT, QuestionMean())
    explore = Term(Estimator(Everything(), Itself(), Signed(), EntropyWeight(0.1, 1.0)), normaliser=QuestionMean())
    mix = Mix((imitate, compare, explore))
    return Run(name="srft", branching=Star(7), mix=mix, optimizer=AdamW(lr=1e-6, weight_decay=0.01), **PUBLISHED)


def small() -> Run:
    """SRFT on the quickstart's task, from its supervised model, with a teacher that is right, on a CPU."""
    return replace(recipe(), **SMALL)
