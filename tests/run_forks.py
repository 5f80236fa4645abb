"""Tiny runs that branch by attention and by surprise, with adaptive sampling, as a user's recipe file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ramulus.core.task import Path, Task
from ramulus.core.tree import Node, Tree
from ramulus.grow.adaptive import Adaptive
from ramulus.grow.branching import Star
from ramulus.grow.forks import AttentionForks, EarlyForks, EntropyForks
from ramulus.grow.prompts import PromptBatch
from ramulus.grow.schedule import Fixed
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior, Recomputed
from ramulus.run.config.recipe import Run
from ramulus.run.signals import Concluded, ForwardInfluence, SignalContext
from run_recipe import rl

FORKS = AttentionForks(roots=4, points=2, branches=1, distance=2)


def recipe() -> Run:
    """AttnRL in small: prompts, roots and branches all depend on what was seen before."""
    mix = Mix((Term(Estimator(DualClip(0.2, 0.28), Behavior(), GlobalLocal())),))
    schedule = Adaptive(PromptBatch(4, target=60, rounding="none", most=9))
    signals = (ForwardInfluence(delta=1),)
    return replace(rl(), name="attnrl", branching=FORKS, signals=signals, schedule=schedule, mix=mix, evals=None, eval_every=0)


def early() -> Run:
    return replace(recipe(), branching=EarlyForks(4, 2, 1, distance=2), schedule=Fixed(4))


@dataclass(frozen=True)
class Nothing:
    """No answer is right."""

    def __call__(self, task: Task, path: Path) -> dict[str, float]:
        return {"reward": 0.0, "correct": 0.0}


def hopeless() -> Run:
    return replace(recipe(), rewards=Nothing())


def entropy() -> Run:
    return replace(recipe(), branching=EntropyForks(4, 2, 2, 1), signals=(Concluded(("=",)),), schedule=Fixed(4))


@dataclass(frozen=True)
class Unlike:
    """Credit of a token: whether it differs from the one before it, where the path is right."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [
            Credits(token={leaf.id: [(leaf.reward or 0.0) * x for x in leaf.signals["change"]] for leaf in tree.leaves()})
            for tree in forest
        ]


@dataclass(frozen=True)
class Change:
    """1 where a token differs from the one before it in its node."""

    provides: ClassVar[tuple[str, ...]] = ("change",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, trees: Sequence[Tree], context: SignalContext) -> Iterator[tuple[Node, str, list[float]]]:
        for tree in trees:
            for node in tree.walk():
                yield node, "change", [float(a != b) for a, b in zip(node.tokens, [-1, *node.tokens])]


def credited() -> Run:
    """An advantage that reads a signal of the recipe, behind a rule that reads none."""
    mix = Mix((Term(Estimator(DualClip(0.2, 0.28), Behavior(), Unlike())),))
    return replace(recipe(), branching=Star(4), schedule=Fixed(4), signals=(Change(),), mix=mix)


def recomputed() -> Run:
    """Against the untempered start of the step: the pass for influence is one that is needed anyway."""
    mix = Mix((Term(Estimator(DualClip(0.2, 0.28, column="recomputed"), Recomputed(), GlobalLocal())),))
    return replace(recipe(), mix=mix, minibatches=2)


def ahead() -> Run:
    """One step off-policy."""
    return replace(recipe(), ahead=1)


def segments() -> Run:
    """TreePO's sampler, one step off-policy, with dynamic sampling."""
    return replace(rl(), ahead=1)
