"""Pruning rules, and what pruned paths cost a tree."""

from __future__ import annotations

import asyncio

import pytest

from growing import EOS, Recorder, decode, plant
from ramulus.core.tree import Author
from ramulus.engine.engine import Sampling
from ramulus.grow.branching import length
from ramulus.grow.fallback import Anyone
from ramulus.grow.growth import grow_forest
from ramulus.grow.pruning import Length, Repetition
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop

SAMPLING = Sampling(max_tokens=64)


def test_pruned_paths_use_up_width_but_for_rerolls() -> None:
    stop = Stop((EOS,), 12)
    for rerolls in (0, 3, 1000):
        rule = Segments(8, 3, 4, 2, seeds=Anyone(), rerolls=rerolls)
        engine = Recorder(vocab=8, spread=1.0)
        forest = [plant(f"t{i}") for i in range(10)]
        asyncio.run(grow_forest(forest, engine, rule, SAMPLING, stop, (Length(shortest=4),)))
        for tree in forest:
            pruned = sum(leaf.finish == "pruned" for leaf in tree.leaves())
            assert len(tree.leaves()) - min(pruned, rerolls) == 8
            assert all(length(leaf) >= 4 for leaf in tree.leaves() if leaf.finish != "pruned")
        assert any(leaf.finish == "pruned" for tree in forest for leaf in tree.leaves())


def test_pruning_rules() -> None:
    tree = plant()
    dull = tree.add(tree.root, [1, 2] * 6, Author.POLICY)
    lively = tree.add(tree.root, [1, 2, 3, 4, 5, 6, 7, 1, 3, 5, 7, 2], Author.POLICY)
    done = tree.add(tree.root, [1, 2] * 6, Author.POLICY, finish="eos")
    assert Repetition(4, 4)(tree) == [dull]
    assert Repetition(4, 6)(tree) == [], "1212 begins in 5 places"
    assert Repetition(4, 4, decode)(tree) == [dull]
    assert Length(longest=11)(tree) == [dull, lively, done]
    assert Length(shortest=13)(tree) == [done], "a living path may still grow"
    tree.fresh = lively.id
    assert Repetition(4, 4)(tree) == [], "older paths were judged before"


@pytest.mark.parametrize(
    "make", [lambda: Repetition(0), lambda: Repetition(times=1), lambda: Length(-1), lambda: Length(5, 4)]
)
def test_wrong_values(make: object) -> None:
    with pytest.raises(ValueError, match=r"needs .* got"):
        make()  # type: ignore[operator]
