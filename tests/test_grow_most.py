"""How many paths a tree has at most: every shipped rule says it of itself, trees keep to it and reach it, and what is not said is assumed aloud."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ramulus.grow
from growing import EOS, plant
from ramulus.core.recipe_part import with_defaults
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.engine.engine import Sampling
from ramulus.engine.toy import ToyEngine
from ramulus.grow.adaptive import Adaptive
from ramulus.grow.allocation import FirstByTokens, MoreFirst
from ramulus.grow.branching import BranchingOptions, Bud, Star, innermost, paths
from ramulus.grow.demonstration import Hinted
from ramulus.grow.forks import AttentionForks, EarlyForks, EntropyForks
from ramulus.grow.growth import demonstrate, grow_forest
from ramulus.grow.prompts import PromptBatch
from ramulus.grow.schedule import Dynamic, Fixed
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.recipes import grpo
from ramulus.run.dry_run import Pace, drawn_at_most, estimated
from ramulus.run.memory.auto import settled
from ramulus.run.memory.report import planned, remarks
from ramulus.run.memory.work import work_of

WHOLE = Stop((), 24)  # no path ends before
SHOWN = (3, 2, 1, 3, 2, 1, 4, 5)


def most_paths(rule: Any, more: int = 0) -> int | None:
    return with_defaults(rule, BranchingOptions).most_paths(more)


@dataclass(frozen=True)
class Worst:
    """Prunes so many living paths of every round."""

    count: int

    def __call__(self, tree: Tree) -> list[Node]:
        return [leaf for leaf in paths(tree) if leaf.finish is None and leaf.id >= tree.fresh][: self.count]


async def signals(trees: Sequence[Tree]) -> None:
    """Every other token begins a step; all are attended to, and none is closed."""
    for node in (node for tree in trees for node in tree.walk() if node.author is Author.POLICY):
        length = len(node.tokens)
        node.signals |= {"steps": column([1.0, 0.0] * length, "d")[:length], "influence": column([0.5] * length, "d")}
        node.signals["concluded"] = column([0.0] * length, "d")


def count(rule: Any, stop: Stop = WHOLE, seed: int = 0, prune: int = 0) -> int:
    """Paths that the policy wrote of a tree with a demonstration."""
    tree = plant(seed=seed)
    tree.task = replace(tree.task, demonstrations=(SHOWN,))
    demonstrate(tree, 1)
    pruning = (Worst(prune),) if prune else ()
    asyncio.run(grow_forest([tree], ToyEngine(vocab=8, seed=seed % 5, spread=1.5), rule, Sampling(64), stop, pruning, between=signals))
    return len(paths(tree))


PLAIN = [
    Star(0), Star(5), Segments(7, 3, 8), Segments(7, 3, 8, branching=1, first=4), Segments(9, 2, 12, branching=3, first=MoreFirst(4)),
    AttentionForks(3, 2, 2, distance=1), AttentionForks(2, 3, 1, distance=1, rounds=3), EarlyForks(3, 2, 2, distance=1),
    EntropyForks(3, 2, 2), EntropyForks(2, 1, rounds=3, branches=2, by="entropy"), EntropyForks(2, 2, diverse=3, closed=None),
    Hinted(Star(3), 2), Hinted(Hinted(Star(1)), 3), Hinted(AttentionForks(2, 1, 2, distance=1, rounds=2), 2), Hinted(Segments(6, 3, 8), 2),
    Hinted(Segments(4, 3, 8, first=4), 2),
]  # fmt: skip


@pytest.mark.parametrize("rule", PLAIN, ids=repr)
def test_a_tree_reaches_what_its_rule_says(rule: Any) -> None:
    assert count(rule) == most_paths(rule)


def test_rerolls_are_reached_where_paths_are_pruned() -> None:
    rule = Segments(6, 3, 8, rerolls=4)
    assert (count(rule, prune=2), count(replace(rule, rerolls=0), prune=2), most_paths(rule)) == (10, 6, 10)


def test_all_that_is_shipped_is_tried_here() -> None:
    modules = [importlib.import_module(f"ramulus.grow.{one.name}") for one in pkgutil.iter_modules(ramulus.grow.__path__)]
    classes = {x for module in modules for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__}
    calls = {one: vars(one).get("__call__") for one in classes if not getattr(one, "_is_protocol", False)}
    assert {one for one, call in calls.items() if call and get_type_hints(call).get("return") == list[Bud]} == {type(rule) for rule in PLAIN}
    assert all("most_paths" in vars(type(rule)) for rule in PLAIN)


few = st.integers(1, 3)
alone = st.one_of(
    st.builds(Star, st.integers(0, 6)),
    st.builds(AttentionForks, few, few, few, distance=st.integers(0, 6), rounds=few),
    st.builds(EarlyForks, few, few, few, distance=st.integers(0, 6)),
    st.builds(EntropyForks, few, few, few, few, diverse=st.sampled_from([None, 1, 5])),
    st.builds(
        Segments, st.integers(4, 9), st.integers(1, 5), st.integers(1, 8), branching=few, rerolls=st.integers(0, 3),
        first=st.sampled_from([None, 1, 4, MoreFirst(8), FirstByTokens(30, 2)]), tokens=st.sampled_from([0, 40]),
    ),
)  # fmt: skip
rules = st.one_of(alone, st.builds(Hinted, alone, st.integers(0, 4)), st.builds(Hinted, st.builds(Hinted, alone), few))


@given(rules, st.sampled_from([WHOLE, Stop((EOS,), 12), Stop((EOS,), 3)]), st.integers(0, 99), st.integers(0, 2))
@settings(max_examples=150)
def test_no_tree_has_more_paths_than_its_rule_says(rule: Any, stop: Stop, seed: int, prune: int) -> None:
    assert count(rule, stop, seed, prune) <= most_paths(rule)


@dataclass(frozen=True)
class Silent:
    """A rule of one's own, with fields that say nothing."""

    n: int = 5
    width: int = 6
    roots: int = 7
    needs: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[int | None] = None

    def __call__(self, tree: Tree) -> list[Bud]:
        return Star(self.n)(tree)


@dataclass(frozen=True)
class Around:
    """A rule around another that says nothing of itself."""

    branching: Any
    needs: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[int | None] = None

    def __call__(self, tree: Tree) -> list[Bud]:
        return self.branching(tree)


def test_a_rule_around_another_asks_it() -> None:
    segments = Segments(6, 3, 8, branching=2)
    assert [innermost(rule) for rule in (segments, Hinted(segments), Around(Hinted(segments)))] == [segments] * 3
    assert most_paths(Around(Hinted(Star(4), 2)), 1) == 7
    assert [most_paths(rule) for rule in (Silent(), Around(Silent()), Hinted(Around(Silent())))] == [None] * 3


def test_the_trees_of_a_step() -> None:
    schedules = Fixed(5), Dynamic(6, oversample=1.5), *(Adaptive(PromptBatch(4, 40, most=most)) for most in (9, 3, 0))
    assert [schedule.most_trees for schedule in schedules] == [5, 6, 9, 4, None]
    assert [drawn_at_most(run, work_of(run)) for run in (replace(grpo.recipe(), schedule=schedule) for schedule in schedules[:2])] == [5, 27]
    works = [work_of(replace(grpo.recipe(), schedule=schedule)) for schedule in schedules]
    assert [(work.first, work.trees, len(work.assumed)) for work in works] == [(5, 5, 0), (6, 6, 0), (4, 9, 0), (4, 4, 0), (4, 4, 1)]
    assert [works[2].spelled, works[3].spelled] == ["4 trees of 8 paths (later up to 9 trees)", "4 trees of 8 paths"]


@pytest.mark.parametrize(("rule", "name"), [(Silent(), "Silent"), (Hinted(Around(Silent())), "Silent")])
def test_what_is_not_said_is_assumed_aloud_and_once(rule: Any, name: str, tmp_path: Any) -> None:
    from run_recipe import recipe

    run = replace(recipe(), branching=rule, schedule=Adaptive(PromptBatch(4, 40)), tokens_per_batch="auto", device="cpu", out=str(tmp_path))
    memory = planned(run)
    assert (memory.work.trees, memory.work.paths) == (4, 8 + run.demonstrations)
    parts: Any = SimpleNamespace(tasks=[plant().task], evals=[], final_tasks=[])
    ways = {
        "plan": remarks(run, memory),
        "auto": [settled(run, run.model()[0], "cpu")[1].remark],
        "dry run": estimated(run, parts, Pace(100.0, 100.0), []),
    }
    for way, lines in ways.items():
        words = "\n".join(lines)
        assert words.count(f"{name} does not say how many paths a tree has at most: 8 were assumed") == 1, way
        assert words.count("Adaptive does not bound the trees of a step: 4 were assumed") == 1, way
