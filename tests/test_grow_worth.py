"""Early pruning of low-value paths: the estimates, the budget, and where the saved width goes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growing import EOS, Recorder, plant
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.engine.engine import Sampling
from ramulus.grow.branching import depth
from ramulus.grow.fallback import Anyone
from ramulus.grow.growth import grow_forest
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.grow.worth import Agreement, Estimated, LowValue, MeanLogprob


def branch(parent: Node, tree: Tree, logprobs: list[float], tokens: list[int] | None = None) -> Node:
    return tree.add(parent, tokens or [1] * len(logprobs), Author.POLICY, logprobs=logprobs)


def test_mean_logprob_is_over_the_last_tokens_of_the_whole_path() -> None:
    tree = plant()
    stem = branch(tree.root, tree, [-4.0, -2.0])
    left, right = branch(stem, tree, [-1.0]), branch(stem, tree, [-3.0, -5.0])
    assert MeanLogprob()(tree, [left, right]) == [-7 / 3, -3.5]
    assert MeanLogprob(2)(tree, [left, right]) == [-1.5, -4.0]
    assert MeanLogprob()(plant(), [plant().root]) == [None]


def test_agreement_is_with_the_same_place_of_other_paths() -> None:
    def partial(tokens: list[int]) -> list[str]:
        return [str(token) for token in tokens]

    tree = plant()
    a, b, c, short = (branch(tree.root, tree, [-1.0] * len(t), t) for t in ([1, 2], [1, 2], [1, 3], [1]))
    assert Agreement(partial)(tree, [a, b, c, short]) == [1 / 2, 1 / 2, 0, 1]
    assert Agreement(partial, least=3)(tree, [a, short]) == [None, 1], "two others are too few"
    a.finish = c.finish = "eos"
    assert Agreement(partial)(tree, [b]) == [1 / 2], "ended paths have their say"
    assert Agreement(lambda tokens: [])(tree, [b]) == [None]


def test_a_signal_is_read_where_the_path_last_carries_it() -> None:
    tree = plant()
    stem = branch(tree.root, tree, [-1.0])
    stem.signals["value"] = column([0.25], "d")
    leaf, bare = branch(stem, tree, [-1.0, -1.0]), branch(tree.root, tree, [-1.0])
    assert Estimated()(tree, [leaf, bare]) == [0.25, None]
    leaf.signals["value"] = column([0.5, 0.75], "d")
    assert Estimated()(tree, [leaf]) == [0.75]


def test_the_worst_go_first_within_budget_and_survivors() -> None:
    tree = plant()
    leaves = [branch(tree.root, tree, [value]) for value in (-1.0, -5.0, -3.0, -4.0)]
    assert LowValue(MeanLogprob(), budget=2, below=-2.0)(tree) == [leaves[1], leaves[3]], "in the order of the tree"
    assert LowValue(MeanLogprob(), budget=9, below=0.0, keep=3)(tree) == [leaves[1]]
    assert LowValue(MeanLogprob(), budget=9)(tree) == [leaves[1], leaves[3]], "below the median of -3.5"
    assert LowValue(MeanLogprob(), budget=9, margin=1.4)(tree) == [leaves[1]]
    assert LowValue(MeanLogprob(), budget=9, below=0.0, after=2)(tree) == []
    leaves[1].finish = "pruned"
    assert LowValue(MeanLogprob(), budget=2, below=-2.0)(tree) == [leaves[3]], "one of two is spent"
    leaves[3].finish = "eos"
    assert LowValue(MeanLogprob(), budget=9, below=-2.0)(tree) == [leaves[2]], "an ended path is not pruned"
    tree.fresh = tree.serial
    assert LowValue(MeanLogprob(), budget=9, below=0.0)(tree) == [], "older paths were judged before"


@given(seed=st.integers(0, 10**6), budget=st.integers(1, 6), keep=st.integers(1, 3), after=st.integers(1, 3))
def test_grown_trees_respect_the_budget_and_spend_what_it_saves(seed: int, budget: int, keep: int, after: int) -> None:
    rule = LowValue(MeanLogprob(), budget, keep=keep, after=after)
    sampler = Segments(8, 4, 3, 2, seeds=Anyone(), rerolls=budget)
    tree = plant("t", seed)
    engine = Recorder(vocab=8, spread=1.0)
    asyncio.run(grow_forest([tree], engine, sampler, Sampling(64), Stop((EOS,), 12), (rule,)))
    pruned = [leaf for leaf in tree.leaves() if leaf.finish == "pruned"]
    assert len(pruned) <= budget
    assert all(depth(leaf) >= after for leaf in pruned)
    assert len(tree.leaves()) - len(pruned) == 8, "as many paths end as without pruning"


def test_something_is_pruned_by_the_rule_of_the_property_test() -> None:
    tree = plant("t", 3)
    rule = LowValue(MeanLogprob(), budget=4)
    sampler = Segments(8, 4, 3, 2, seeds=Anyone(), rerolls=4)
    asyncio.run(grow_forest([tree], Recorder(vocab=8, spread=1.0), sampler, Sampling(64), Stop((EOS,), 12), (rule,)))
    assert any(leaf.finish == "pruned" for leaf in tree.leaves())


@pytest.mark.parametrize(
    "make",
    [
        lambda: MeanLogprob(-1),
        lambda: Agreement(lambda tokens: [], 0),
        lambda: LowValue(MeanLogprob(), 0),
        lambda: LowValue(MeanLogprob(), 1, keep=0),
        lambda: LowValue(MeanLogprob(), 1, after=0),
        lambda: LowValue(MeanLogprob(), 1, margin=-1.0),
    ],
)
def test_wrong_values(make: object) -> None:
    with pytest.raises(ValueError, match="got"):
        make()  # type: ignore[operator]
