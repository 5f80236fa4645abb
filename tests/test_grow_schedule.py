"""How many prompts to draw, and which trees have signal."""

from __future__ import annotations

import pytest

from growing import chain, plant
from ramulus.core.tree import Tree
from ramulus.grow.growth import demonstrate
from ramulus.grow.schedule import Dynamic, Fixed, Schedule


def graded(*rewards: float | None, correct: bool = False) -> Tree:
    """A tree with a path for each reward."""
    tree = plant()
    for reward in rewards:
        leaf = chain(tree, [2], "pruned" if reward is None else "eos")
        leaf.reward = reward
        if correct and reward is not None:
            leaf.verdict = {"correct": float(reward > 0)}
    return tree


def draws_of(schedule: Schedule, share: list[bool]) -> tuple[list[int], int]:
    """Draw as a trainer does; `share` says in turn which trees have signal. -> (sizes of the draws, trees kept)."""
    signal, kept, sizes, state = iter(share * 100), [], [], {}
    while True:
        count, state = schedule(kept, len(sizes), state)
        if not count:
            return sizes, len(kept)
        sizes.append(count)
        drawn = [graded(0, 1) if next(signal) else graded(1, 1) for _ in range(count)]
        kept += [tree for tree in drawn if schedule.keep(tree)]


def test_fixed() -> None:
    assert draws_of(Fixed(5), [False]) == ([5], 5)


def test_dynamic_draws_again_and_gives_up_in_time() -> None:
    assert draws_of(Dynamic(8), [True]) == ([8], 8)
    assert draws_of(Dynamic(8, draws=9), [True, False]) == ([8, 4, 2, 1], 8)
    assert draws_of(Dynamic(8, draws=2), [True, False]) == ([8, 4], 6)
    assert draws_of(Dynamic(8), [False]) == ([8, 8, 8], 0), "no signal at all ends too"
    assert draws_of(Dynamic(8, draws=1), [False]) == ([8], 0)
    assert draws_of(Dynamic(8, oversample=2.0), [True, False]) == ([16], 8)


def test_state_is_handed_back() -> None:
    assert Dynamic(4)([], 0, {"mine": 1})[1] == {"mine": 1}
    assert Fixed(4)([], 0, {"mine": 1})[1] == {"mine": 1}


def test_keep() -> None:
    keep = Dynamic(4).keep
    assert keep(graded(0, 1, 1))
    assert not keep(graded(1, 1, 1))
    assert not keep(graded(0, 0))
    assert keep(graded(0, 0.5)), "rewards differ"
    assert not keep(graded(1, 0.5, correct=True)), "both correct, an over-long penalty is no signal"
    assert keep(graded(-1, 0.5, correct=True))
    assert not keep(graded(1, 1, None)), "a pruned path says nothing"
    assert keep(graded(1)), "a lone path has no group to differ from"
    assert not keep(graded(None, None))
    assert not keep(graded(None))
    assert keep(plant()), "nothing sampled: supervised"
    tree = plant()
    tree.task = type(tree.task)("d", (1,), "d", demonstrations=((3, 0),))
    demonstrate(tree, 1)
    for _ in range(2):
        chain(tree, [2]).reward = 0.0
    assert not keep(tree), "a demonstration is not the policy's"


@pytest.mark.parametrize(
    "make", [lambda: Fixed(0), lambda: Dynamic(0), lambda: Dynamic(4, 0), lambda: Dynamic(4, 3, 0.5)]
)
def test_wrong_values(make: object) -> None:
    with pytest.raises(ValueError, match=r"at least 1.*, got"):
        make()  # type: ignore[operator]
