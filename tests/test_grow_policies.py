"""Allocation and fallback policies against numbers worked out by hand."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growing import chain, plant
from ramulus.core.tree import Author, Node
from ramulus.grow.allocation import ByLogprob, Even, FirstByTokens, MoreFirst, Ramp, largest_remainder, softmax
from ramulus.grow.branching import Bud, Star, length
from ramulus.grow.fallback import (
    PRIORITY,
    Answered,
    Anyone,
    BlockCut,
    FinishedFirst,
    FromStart,
    LongAnswered,
    LongerFirst,
    RandomCut,
    WorstTokenCut,
)


def leaf_of(*logprobs: float) -> Node:
    """A path of one segment with these log-probs."""
    tree = plant()
    return tree.add(tree.root, [1] * len(logprobs), Author.POLICY, logprobs=list(logprobs))


def leaves_of(*means: float) -> list[Node]:
    """Paths of four tokens with these mean log-probs."""
    return [leaf_of(*[mean] * 4) for mean in means]


def test_even() -> None:
    three = leaves_of(-1, -1, -1)
    assert Even()(three, 11, 4, 0) == [3, 3, 5]
    assert Even(spread=True)(three, 11, 4, 0) == [4, 4, 3]
    assert Even()(three, 3, 4, 0) == [1, 1, 1]


def test_by_logprob_by_hand() -> None:
    # mean log-probs -1, -2, -3: s = -(x - min) = -2, -1, 0, softmax 0.0900, 0.2447, 0.6652
    leaves = leaves_of(-1, -2, -3)
    low = ByLogprob(over="mean")
    # 10 branches: one each, then 7 x p = 0.63, 1.71, 4.66: floors 0, 1, 4 and two more to remainders 0.71 and 0.66
    assert low(leaves, 10, 4, 0) == [1, 1 + 2, 1 + 5]
    assert ByLogprob(over="mean", favour="high")(leaves, 10, 4, 0) == [1 + 5, 1 + 2, 1]
    # T = 2: s / T = -1, -0.5, 0, softmax 0.1863, 0.3072, 0.5065; 7 x p = 1.30, 2.15, 3.55
    assert ByLogprob(over="mean", temperature=2.0)(leaves, 10, 4, 0) == [1 + 1, 1 + 2, 1 + 4]
    # the sums are -4, -8, -12: softmax 0.0003, 0.0180, 0.9817; 7 x p = 0.00, 0.13, 6.87
    assert ByLogprob(over="sum")(leaves, 10, 4, 0) == [1, 1, 1 + 7]
    assert ByLogprob(over="mean")(leaves_of(-1, -1), 5, 4, 0) == [3, 2], "ties go to the earlier path"
    assert ByLogprob(over="mean")(leaves_of(-1), 4, 4, 0) == [4]


def test_last_segment_only() -> None:
    tree = plant()
    first = tree.add(tree.root, [1] * 3, Author.POLICY, logprobs=[-9.0] * 3)
    calm = tree.add(first, [1] * 2, Author.POLICY, logprobs=[-0.5] * 2)
    wild = tree.add(tree.root, [1] * 5, Author.POLICY, logprobs=[-0.1, -0.1, -0.1, -3.0, -3.0])
    rule = ByLogprob(over="last")
    assert rule.statistic([-9.0] * 3 + [-0.5] * 2, 2) == -0.5
    assert ByLogprob(over="mean").statistic([-9.0] * 3 + [-0.5] * 2, 2) == pytest.approx(-5.6)
    # x = -0.5 and -3: softmax(-2.5, 0) = 0.0759, 0.9241; 4 x p = 0.30, 3.70
    assert rule([calm, wild], 6, 2, 0) == [1, 5]
    assert rule([calm], 6, 99, 0) == [6], "a path shorter than a segment is taken whole"


def test_ramp() -> None:
    up, down = Ramp(100, 1.0, 5.0), Ramp(100, 1.0, 5.0, rising=False)
    assert [up(t) for t in (0, 50, 100, 1000)] == pytest.approx([1, 3, 5, 5])
    assert [down(t) for t in (0, 50, 100, 1000)] == pytest.approx([5, 3, 1, 1])
    assert up(25) == pytest.approx(3 + 2 * math.sin(-math.pi / 4))
    leaves = leaves_of(-1, -3)
    rule = ByLogprob(over="mean", temperature=Ramp(10, 0.1, 1000.0))
    assert rule(leaves, 12, 4, 0) == [1, 11]
    assert rule(leaves, 12, 4, 10) == [6, 6]


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=9), st.integers(0, 40))
def test_shares_sum_up_and_nobody_is_left_out(means: list[float], more: int) -> None:
    leaves = leaves_of(*means)
    total = len(leaves) + more
    for rule in (Even(), Even(spread=True), ByLogprob(), ByLogprob(favour="high"), ByLogprob(over="sum")):
        counts = rule(leaves, total, 4, 3)
        assert sum(counts) == total
        assert min(counts) >= 1
    assert sum(largest_remainder(softmax(means), more)) == more


def test_random_cut() -> None:
    tree = plant()
    leaf = chain(tree, [4, 4, 2])
    dice = random.Random(0)

    def cuts(rule: RandomCut, segment: int = 4) -> Counter[int]:
        return Counter(rule(leaf, dice, segment) for _ in range(3000))

    aligned = cuts(RandomCut())
    assert set(aligned) == {0, 4, 8}
    assert all(abs(count - 1000) < 120 for count in aligned.values())
    assert set(cuts(RandomCut(3))) == {0, 3, 6, 9}
    assert set(cuts(RandomCut(3, most=2))) == {6, 9}
    assert set(cuts(RandomCut(most=9))) == {0, 4, 8}
    assert set(cuts(RandomCut(), 5)) == {0, 5}, "never the very end"
    assert set(cuts(RandomCut(100))) == {0}


def test_block_cut() -> None:
    leaf = leaf_of(*[-0.1] * 4, *[-2.1] * 4, *[-0.1] * 2)
    dice = random.Random(0)

    def shares(rule: BlockCut) -> dict[int, float]:
        found = Counter(rule(leaf, dice, 4) for _ in range(6000))
        return {cut: count / 6000 for cut, count in sorted(found.items())}

    # softmax of 0.1, 2.1, 0.1 and of -0.1, -2.1, -0.1
    assert shares(BlockCut(4)) == pytest.approx({0: 0.1065, 4: 0.7870, 8: 0.1065}, abs=0.02)
    assert shares(BlockCut(4, favour="high")) == pytest.approx({0: 0.4683, 4: 0.0634, 8: 0.4683}, abs=0.02)
    assert shares(BlockCut(4, window=11)) == {0: 1.0}
    assert set(shares(BlockCut(3))) <= {0, 3, 6, 9}


def test_worst_token_and_from_start() -> None:
    dice = random.Random(0)
    leaf = leaf_of(-1, -1, -7, -2, -7)
    assert WorstTokenCut()(leaf, dice, 4) == 2
    assert WorstTokenCut()(leaf, dice, 6) == 0, "shorter than a window"
    assert WorstTokenCut(window=2)(leaf, dice, 6) == 2
    assert FromStart()(leaf, dice, 4) == 0


def finished() -> list[Node]:
    tree = plant()
    return [
        chain(tree, [4, n], finish) for n, finish in enumerate(("length", "eos", "answer", None, "repetition", "eos"))
    ]


def test_seed_orders() -> None:
    leaves, dice = finished(), random.Random(1)
    assert {leaf.finish for leaf in Answered()(leaves, dice, 4)} == {"eos", "answer"}
    assert len(Answered()(leaves, dice, 4)) == 3
    assert len({tuple(leaf.id for leaf in Answered()(leaves, dice, 4)) for _ in range(100)}) == 6, "shuffled"
    strict = [leaf.finish for leaf in FinishedFirst(strict=True)(leaves, dice, 4)]
    assert strict == ["answer", "eos", "eos", None, "length", "repetition"], "the best first"
    assert len({FinishedFirst(strict=True)(leaves, dice, 4)[1].id for _ in range(50)}) == 2, "ties at random"
    assert sorted(leaf.id for leaf in Anyone()(leaves, dice, 4)) == [leaf.id for leaf in leaves]
    assert [leaf.finish for leaf in LongAnswered(1)(leaves, dice, 4)] == ["answer"]
    assert LongAnswered(2)(leaves, dice, 4) == [], "6 tokens are no 2 windows of 4"
    assert [leaf.finish for leaf in LongAnswered(2)(leaves, dice, 3)] == ["answer"]
    assert [leaf.finish for leaf in LongAnswered(2, window=3)(leaves, dice, 4)] == ["answer"]


def test_weighted_orders_draw_without_replacement_by_weight() -> None:
    leaves, dice = finished(), random.Random(2)
    tops: Counter[int] = Counter()
    for _ in range(6000):
        order = FinishedFirst()(leaves, dice, 4)
        assert {leaf.id for leaf in order} == {leaf.id for leaf in leaves}
        tops[order[0].id] += 1
    weights = [PRIORITY[leaf.finish] for leaf in leaves]
    assert weights == [3, 5, 7, 4, 2, 5]
    for leaf, weight in zip(leaves, weights):
        assert tops[leaf.id] / 6000 == pytest.approx(weight / sum(weights), abs=0.02)
    tops = Counter(LongerFirst()(leaves, dice, 4)[0].id for _ in range(6000))
    sizes = [length(leaf) for leaf in leaves]
    for leaf, size in zip(leaves, sizes):
        assert tops[leaf.id] / 6000 == pytest.approx(size / sum(sizes), abs=0.02)


def test_star() -> None:
    tree = plant()
    assert [bud.node for bud in Star(3)(tree)] == [tree.root] * 3
    assert Star(0)(tree) == []
    tree.rounds = 1
    assert Star(3)(tree) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Star(-1), "got n=-1"),
        (lambda: Bud(plant().root, -1), "got -1"),
        (lambda: Bud(plant().root, max_tokens=0), "at least 1.*got 0"),
        (lambda: RandomCut(-1), "at least 1 token, got -1: None takes the segment length"),
        (lambda: RandomCut(most=-1), "got -1"),
        (lambda: BlockCut(0), "at least 1 token, got 0"),
        (lambda: BlockCut(favour="best"), "'low' or 'high', got 'best'"),
        (lambda: WorstTokenCut(0), "got 0"),
        (lambda: LongAnswered(0), "got 0: Answered"),
        (lambda: ByLogprob(over="max"), "got 'max'"),
        (lambda: ByLogprob(favour="best"), "got 'best'"),
        (lambda: ByLogprob(temperature=0.0), "above 0, got 0.0"),
        (lambda: Ramp(0), "got 0"),
        (lambda: Ramp(10, 5.0, 1.0), "rising=False"),
        (lambda: MoreFirst(2, 5), "low=5 and high=2"),
        (lambda: FirstByTokens(0, 1), "got 0 and 1"),
    ],
)
def test_wrong_values_name_the_value(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
