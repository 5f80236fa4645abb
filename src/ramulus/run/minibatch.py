"""A step's trees in minibatches, each with what is derived of it once: credit, weights, and which leaves are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ramulus.core.tree import Tree
from ramulus.learn.batch.tree_batch import Credits, TreeBatch
from ramulus.learn.objective.gate import GateWeights
from ramulus.learn.objective.mix import Mix
from ramulus.learn.packing.weights import Selection, select

_Answers = Sequence[Sequence[Credits]]
"""What `Mix.credit` answered: of each term, of each tree."""


@dataclass(frozen=True)
class Minibatch:
    """Whole trees for one optimizer step, with their credit and the leaves that are trained."""

    trees: list[Tree]
    credits: _Answers
    selection: Selection


def minibatches(
    forest: list[Tree], credits: _Answers, gates: Sequence[GateWeights] | None, mix: Mix, wanted: int
) -> list[Minibatch]:
    """A credited forest in at most `wanted` minibatches; `gates` holds what `mix.gates` answered for each tree."""
    batches = []
    for part in parts(len(forest), wanted):
        trees, answers = forest[part], [term[part] for term in credits]
        opened = None if gates is None else gates[part]
        batches.append(Minibatch(trees, answers, select(trees, answers, mix, opened, drop_idle=True)))
    return batches


def step_stats(cut: Sequence[Minibatch], mix: Mix) -> dict[str, float]:
    """What `mix.measure` says of a step's trees and of the leaves that its minibatches train."""
    trees = [tree for part in cut for tree in part.trees]
    trained = [[leaves for part in cut for leaves in part.selection.terms[m]] for m in range(len(mix.terms))]
    return mix.measure(trees, trained) if trees else {}


def parts(n: int, wanted: int) -> list[slice]:
    """n trees in at most `wanted` runs of whole trees, as even as can be."""
    count = min(n, wanted)
    edges = [i * n // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(edges)]


def has_signal(mix: Mix, batch: TreeBatch) -> bool:
    """Whether anything in a row pulls at the weights."""
    pulls = bool((batch.gain != 0).any()) or bool((batch.pain != 0).any())
    return pulls or ((mix.kl_coef != 0 or mix.entropy_bonus != 0 or mix.value != 0) and bool((batch.weight != 0).any()))
