"""Tiny runs that branch by attention and by surprise, with adaptive sampling, as a user's recipe file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

from ramulus.core.task import Path, Task
from ramulus.core.tree import Node, Tree
from ramulus.grow.adaptive import Adaptive
from ramulus.grow.allocation import Even
from ramulus.grow.branching import Star, paths
from ramulus.grow.demonstration import Hinted
from ramulus.grow.fallback import Anyone, RandomCut
from ramulus.grow.forks import AttentionForks, EarlyForks, EntropyForks
from ramulus.grow.prompts import PromptBatch
from ramulus.grow.schedule import Fixed
from ramulus.grow.segments import Segments
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective import gate
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import DualClip, Everything
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior, Recomputed
from ramulus.learn.objective.token_weight import HighEntropy, Product
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


def seen(trees: Sequence[Tree]) -> None:
    """Raise KeyError unless every path of the policy's carries the signal "change"."""
    for leaf in (leaf for tree in trees for leaf in paths(tree)):
        leaf.signals["change"]


@dataclass(frozen=True)
class ChangeGate(gate.Even):
    """A gate that reads a signal."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def __call__(self, tree: Tree, state: dict[str, Any]) -> tuple[gate.GateWeights, dict[str, Any]]:
        seen([tree])
        return super().__call__(tree, state)


class MeasuresChange:
    """What measures a signal of the whole step."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def measure(self, forest: Sequence[Tree], keep: Sequence[Collection[int]]) -> dict[str, float]:
        seen(forest)
        return {}


@dataclass(frozen=True)
class ChangeClip(MeasuresChange, DualClip):
    """A mask that reads a signal of the whole step."""


@dataclass(frozen=True)
class ChangeBehavior(MeasuresChange, Behavior):
    """A reference that reads a signal of the whole step."""


@dataclass(frozen=True)
class ChangeHeat(ByEntropy):
    """A temperature rule that reads a signal of the step before."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def measure(self, forest: Sequence[Tree]) -> dict[str, float] | None:
        seen(forest)
        return super().measure(forest)


@dataclass(frozen=True)
class ChangeCut(RandomCut):
    """A cut that reads a signal of the path it cuts."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def __call__(self, leaf: Node, dice: Random, segment: int) -> int:
        leaf.signals["change"]
        return super().__call__(leaf, dice, segment)


@dataclass(frozen=True)
class ChangeSeeds(Anyone):
    """An order of seeds that reads a signal of theirs."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def __call__(self, finished: Sequence[Node], dice: Random, segment: int) -> list[Node]:
        for leaf in finished:
            leaf.signals["change"]
        return super().__call__(finished, dice, segment)


@dataclass(frozen=True)
class ChangeShares(Even):
    """An allocation that reads a signal of the living paths."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def __call__(self, leaves: Sequence[Node], total: int, segment: int, step: int) -> list[int]:
        for leaf in leaves:
            leaf.signals["change"]
        return super().__call__(leaves, total, segment, step)


@dataclass(frozen=True)
class ChangeRoots(Fixed):
    """A schedule that reads a signal of the first round."""

    needs: ClassVar[tuple[str, ...]] = ("change",)

    def expand(self, trees: Sequence[Tree], state: dict[str, Any]) -> tuple[list[set[int]], dict[str, Any]]:  # type: ignore[override]
        seen(trees)
        return [{leaf.id for leaf in tree.leaves()} for tree in trees], state


@dataclass(frozen=True)
class UnreadStar(Star):
    """A star that reads nothing, after no round."""

    rounds: ClassVar[int | None] = 0


@dataclass(frozen=True)
class Half(Fixed):
    """Keeps about every other tree."""

    def keep(self, tree: Tree) -> bool:
        return sum(map(ord, tree.task.id)) % 2 == 0


def of_change(**parts: Any) -> Run:
    """A run in which nothing reads the signal of the recipe but what is given; half its trees are dropped."""
    mask, reference = (parts.pop(name, usual) for name, usual in (("mask", DualClip(0.2, 0.28)), ("reference", Behavior())))
    mix = Mix((Term(Estimator(mask, reference, GroupMean())),), gate=parts.pop("gate", None))
    return replace(recipe(), **{"branching": Star(3), "schedule": Half(6), "signals": (Change(),), "mix": mix} | parts)


def by_gate() -> Run:
    return of_change(gate=ChangeGate())


def by_mask() -> Run:
    return of_change(mask=ChangeClip(0.2, 0.28))


def by_inner_mask() -> Run:
    return of_change(mask=Product((PerAuthor(ChangeClip(), Everything()), HighEntropy(0.5))))


def by_reference() -> Run:
    return of_change(reference=ChangeBehavior())


def by_temperature() -> Run:
    return of_change(temperature=ChangeHeat())


def by_cut() -> Run:
    return of_change(branching=Segments(4, 2, 4, fallback=ChangeCut(), seeds=Anyone()))


def by_seeds() -> Run:
    return of_change(branching=Hinted(Segments(4, 2, 4, seeds=ChangeSeeds()), 0))


def by_allocation() -> Run:
    return of_change(branching=Segments(4, 2, 4, allocation=ChangeShares(), fallback=None))


def by_schedule() -> Run:
    return of_change(branching=UnreadStar(3), schedule=ChangeRoots(6))


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
