"""Adaptive sampling: how many roots grow, which prompts are dropped, how many are drawn; its state is plain JSON."""

from __future__ import annotations

import json
import math

import pytest

from growing import plant
from ramulus.core.tree import Author, Tree, column
from ramulus.grow.adaptive import Adaptive, attended, difficulty, first
from ramulus.grow.prompts import PromptBatch

BATCH = PromptBatch(8, 8 * 30)


def graded(rights: int, of: int = 6, level: float = 0.5, name: str = "t") -> Tree:
    """A tree after its first round: some right paths first, each of two steps with this mean influence."""
    tree = plant(name)
    for i in range(of):
        leaf = tree.add(tree.root, [1, 1, 1, 1], Author.POLICY, finish="eos", reward=float(i < rights))
        leaf.verdict = {"correct": float(i < rights)}
        leaf.signals = {"steps": column([1, 0, 1, 0], "d"), "influence": column([0.0, 0.0, 2 * level, 2 * level], "d")}
    tree.rounds = 1
    return tree


def grow(tree: Tree, ids: set[int]) -> None:
    """Two more paths from the middle of each chosen one: the first right, the second wrong."""
    for leaf in [leaf for leaf in tree.leaves() if leaf.id in ids]:
        for reward in (1.0, 0.0):
            new = tree.graft(leaf, 2)
            new.tokens, new.finish, new.reward, new.verdict = column([1, 1], "i"), "eos", reward, {"correct": reward}


@pytest.mark.parametrize(
    ("rounding", "counts"), [("ceil", [6, 6, 5, 4, 4, 3, 3]), ("nearest", [6, 5, 4, 4, 3, 3, 2]), ("all", [6] * 7)]
)
def test_the_published_numbers_of_expanded_roots(rounding: str, counts: list[int]) -> None:
    rule = Adaptive(BATCH, rounding=rounding, attention=False)
    trees = [graded(n) for n in range(7)]
    chosen, state = rule.expand(trees, {})
    assert [len(ids) for ids in chosen] == counts
    assert state == {}


def test_the_rarer_answers_come_first() -> None:
    rule = Adaptive(BATCH, attention=False)
    for n in range(1, 6):
        tree = graded(n)
        (ids,), _ = rule.expand([tree], {})
        rights = {leaf.id for leaf in tree.leaves() if leaf.reward}
        wrongs = {leaf.id for leaf in tree.leaves()} - rights
        assert (wrongs if n >= 3 else rights) <= ids
        assert ids == rule.expand([tree], {})[0][0]
    drawn = {tuple(sorted(rule.expand([graded(4, name=f"t{i}")], {})[0][0])) for i in range(30)}
    assert len(drawn) > 3, "which of the others depends on the tree"
    assert all({5, 6} <= set(ids) and len(ids) == 4 for ids in drawn)


def test_easy_prompts_must_be_attended_to_more_than_the_mean_of_all_so_far() -> None:
    rule = Adaptive(BATCH)
    trees = [graded(6, level=0.2), graded(3, level=0.0), graded(6, level=0.6)]
    assert attended(first(trees[2])[0]) == pytest.approx(0.6)
    chosen, state = rule.expand(trees, {})
    assert [len(ids) for ids in chosen] == [0, 4, 3]
    assert state == {"easy": {"count": 2, "mean": pytest.approx(0.4)}}
    state = json.loads(json.dumps(state))
    chosen, state = rule.expand([graded(6, level=0.4), graded(6, level=0.8)], state)
    assert [len(ids) for ids in chosen] == [0, 3], "the mean with these is 0.5"
    assert state["easy"] == {"count": 4, "mean": pytest.approx(0.5)}
    assert chosen[1] == {1, 2, 3}
    assert rule.expand([graded(2)], state)[1] == state
    assert rule.expand([graded(6, level=0.5)], {})[0] == [set()], "alone it is the mean itself"


def test_a_mean_that_forgets() -> None:
    rule = Adaptive(BATCH, alpha=0.5)
    _, state = rule.expand([graded(6, level=0.2)], {})
    _, state = rule.expand([graded(6, level=0.6), graded(6, level=0.8)], state)
    assert state["easy"]["mean"] == pytest.approx(0.5 * 0.2 + 0.5 * 0.7)


def test_trees_without_signal_are_dropped_and_the_rest_is_counted() -> None:
    rule = Adaptive(BATCH)
    mixed, even, alone = graded(3), graded(0), graded(6)
    grow(mixed, {1})
    leaf = even.graft(even.leaves()[0], 2)
    leaf.tokens, leaf.finish, leaf.reward, leaf.verdict = column([1], "i"), "eos", 0.0, {"correct": 0.0}
    assert [rule.keep(tree) for tree in (mixed, even, alone)] == [True, False, False]
    assert [len(rule.trained(tree)) for tree in (mixed, even, alone)] == [3, 2, 0]
    assert Adaptive(BATCH, even=False).keep(even)
    assert not Adaptive(BATCH, even=False).keep(alone)
    assert not Adaptive(BATCH, unbranched=True).keep(alone)
    assert len(Adaptive(BATCH, unbranched=True).trained(alone)) == 6
    state: dict = {}
    assert rule([], 0, state) == (8, state)
    wanted, state = rule([mixed, mixed], 1, state)
    assert wanted == 0
    assert state["batch"] == {"prompts": math.ceil(0.1 * (8 * 240 // 6) + 0.9 * 8), "valid": 6.0, "seen": 1}
    assert rule.asked(json.loads(json.dumps(state))) == state["batch"]["prompts"]
    assert difficulty(first(plant())[0]) == 0.0


def settled(rule: PromptBatch, left: float, steps: int = 400) -> int:
    """The size that a rule comes to where every prompt leaves so many sequences."""
    state: dict = {}
    for _ in range(steps):
        state = rule.update(round(left * rule.size(state)), state)
    return rule.size(state)


def test_the_option_without_a_dead_band_finds_the_size_that_is_needed() -> None:
    assert settled(PromptBatch(64, 640, rounding="none"), 8.0) == 80
    assert settled(PromptBatch(100, 640, rounding="none"), 8.0) == 80
    assert settled(PromptBatch(100, 640), 8.0) > 83, "as released it stops short of shrinking"
    assert settled(PromptBatch(76, 640, rounding="nearest"), 8.0) < 79


def test_bounds_and_a_step_that_left_nothing() -> None:
    rule = PromptBatch(16, 480, rounding="none", least=12, most=20)
    state = rule.update(1, {})
    assert rule.size(state) == 20
    assert rule.update(0, state) == state
    assert rule.size(rule.update(10**6, state)) == 18
    assert (
        rule.size(
            rule.update(10**6, rule.update(10**6, rule.update(10**6, rule.update(10**6, rule.update(10**6, state)))))
        )
        == 12
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: PromptBatch(0, 1),
        lambda: PromptBatch(1, 1, alpha=2),
        lambda: PromptBatch(1, 1, beta=0),
        lambda: PromptBatch(1, 1, rounding="up"),
        lambda: PromptBatch(1, 1, least=5, most=4),
        lambda: Adaptive(BATCH, rounding="up"),
        lambda: Adaptive(BATCH, alpha=-1),
    ],
)
def test_what_makes_no_sense_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"PromptBatch|Adaptive"):
        make()


def test_paths_with_help_say_nothing_of_difficulty() -> None:
    """Two of six are right alone; three paths that go on from a part of a demonstration are right, too."""
    plain, helped = graded(2), graded(2)
    shown = helped.add(helped.root, [7, 7, 7, 7], Author.EXPERT, finish="eos", reward=1.0)
    for _ in range(3):
        leaf = helped.graft(shown, 2)
        leaf.tokens, leaf.finish, leaf.reward, leaf.verdict = column([1, 1], "i"), "eos", 1.0, {"correct": 1.0}
        leaf.signals = {"steps": column([1.0, 0.0], "d"), "influence": column([9.0, 9.0], "d")}
    hints = {leaf.id for leaf in helped.leaves() if leaf.why == "" and leaf.parent is not helped.root} - {shown.id}
    assert len(hints) == 3
    assert difficulty(first(helped)[0]) == difficulty(first(plain)[0]) == pytest.approx(1 / 3)
    assert attended(first(helped)[0]) == attended(first(plain)[0])
    rule = Adaptive(BATCH)
    (alone,), _ = rule.expand([plain], {})
    (chosen,), _ = rule.expand([helped], {})
    assert chosen == alone | hints, "all of them are grown from"
    assert rule.trained(helped) == [], "nothing has grown from any path yet"
    assert len(Adaptive(BATCH, unbranched=True).trained(helped)) == 9
