"""One step off-policy: which version samples what, nothing thrown away, and a pending forest that survives a kill."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ramulus.core import run_folder, store
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.engine.engine import Request, Segment, together
from ramulus.engine.toy import ToyEngine
from ramulus.grow.schedule import Fixed
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Recomputed
from ramulus.run.config.recipe import Run
from ramulus.run.launch import launch
from ramulus.run.rollouts import START, Rollouts, cursor_of_json, cursor_to_json
from run_recipe import Digits, rl
from test_resume import killed, metrics, same

RECIPE = str(Path(__file__).parent / "run_forks.py")
STEPS = 4
pytestmark = pytest.mark.usefixtures("torch_as_it_was")


class Crowd(ToyEngine):
    """Notes which tasks, by the first token of their prompts, have requests in flight together."""

    def __init__(self) -> None:
        super().__init__(vocab=8, spread=1.0)
        self.now: list[int] = []
        self.together: set[frozenset[int]] = set()

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        return await together(self.one(request) for request in requests)

    async def one(self, request: Request) -> Segment:
        self.now.append(request.prefix[0])
        await asyncio.sleep(0)
        self.together.add(frozenset(self.now))
        segment = self.continuation(request)
        self.now.remove(request.prefix[0])
        return segment


def run_of(**changes: object) -> Run:
    changes = {"ahead": 1} | changes
    sampler = Segments(4, 3, 4, 2)
    return replace(rl(), branching=sampler, schedule=Fixed(2), steps=STEPS, rewards=Digits(), **changes)  # type: ignore[arg-type]


def harvest(run: Run) -> tuple[list[list[Tree]], Crowd, list[dict]]:
    """The trees of every step, each step with the next version, as the trainer calls it."""
    engine = Crowd()
    tasks = [Task(f"t{i}", (i, 2), "t") for i in range(2 * STEPS)]
    forests = Rollouts(run, tasks, engine, Stop((0,), 12), lambda tokens: "1" * len(tokens))
    cursor, cursors, grown = dict(START), [], []
    for step in range(1, STEPS + 1):
        found, cursor = asyncio.run(forests.get(step, cursor))
        grown.append(found.grown)
        cursors.append(json.loads(json.dumps(cursor_to_json(cursor))))
        asyncio.run(engine.load(None, step))
    return grown, engine, cursors


def sampled(tree: Tree) -> list[Node]:
    return [node for node in tree.walk() if node.author is Author.POLICY and node.tokens]


def first(tree: Tree) -> list[Node]:
    return [node for node in sampled(tree) if node.why == "first"]


def test_the_first_round_is_a_version_older_and_nothing_is_thrown_away() -> None:
    grown, engine, cursors = harvest(run_of())
    for step, trees in enumerate(grown, 1):
        assert all(tree.step == step for tree in trees)
        assert all(node.version == max(step - 2, 0) for tree in trees for node in first(tree))
        rest = [node for tree in trees for node in sampled(tree) if node.why in ("branch", "fallback", "restart")]
        assert rest
        assert all(node.version == step - 1 for node in rest)
    assert engine.counters()["sampled"] == sum(
        len(node.tokens) for trees in grown for tree in trees for node in sampled(tree)
    )
    assert all(len(cursor["young"]) == 2 for cursor in cursors[:-1])
    assert "young" not in cursors[-1], "the last step begins nothing"


@pytest.mark.parametrize("ahead", [0, 1])
def test_two_steps_share_a_crowd_only_ahead(ahead: int) -> None:
    grown, engine, _ = harvest(replace(run_of(), ahead=ahead))
    trained = {tree.task.prompt[0]: step for step, trees in enumerate(grown) for tree in trees}
    assert len(trained) == 2 * STEPS
    mixed = [crowd for crowd in engine.together if len({trained[prompt] for prompt in crowd}) == 2]
    assert bool(mixed) == bool(ahead)


def test_the_trees_are_those_of_a_run_on_policy_where_nothing_is_learned() -> None:
    """With a frozen table, a version older is no other policy: same seeds, same texts."""
    late, _, _ = harvest(run_of())
    now, _, _ = harvest(replace(run_of(), ahead=0))
    for one, other in zip(late, now, strict=True):
        assert [[n.tokens for n in sampled(tree)] for tree in one] == [
            [n.tokens for n in sampled(tree)] for tree in other
        ]


def test_what_stops_half_way_leaves_the_young_trees_as_they_were() -> None:
    run = run_of()
    engine = Crowd()
    tasks = [Task(f"t{i}", (i, 2), "t") for i in range(8)]
    forests = Rollouts(run, tasks, engine, Stop((0,), 12), lambda tokens: "1" * len(tokens))
    _, cursor = asyncio.run(forests.get(1, dict(START)))
    before = json.dumps(cursor_to_json(cursor))
    once, _ = asyncio.run(forests.get(2, cursor))
    assert json.dumps(cursor_to_json(cursor)) == before
    again, _ = asyncio.run(forests.get(2, cursor_of_json(json.loads(before))))
    assert [store.dump(tree) for tree in once.grown] == [store.dump(tree) for tree in again.grown]


@pytest.mark.parametrize(
    ("variant", "moment", "number"),
    [
        (":ahead", "pruning", 1),  # as soon as a checkpoint is in its place
        pytest.param(":segments", "pruning", 1, marks=pytest.mark.slow),
        pytest.param(":ahead", "growing", 30, marks=pytest.mark.slow),
        pytest.param(":segments", "growing", 60, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_with_a_forest_pending_goes_on_bit_for_bit(tmp_path: Path, variant: str, moment: str, number: int) -> None:
    console = Console(quiet=True)
    assert launch(RECIPE + variant, [f"out={tmp_path / 'whole'}"], True, False, console) == 0
    killed(tmp_path / "run", moment, number, RECIPE + variant)
    if moment == "pruning":
        saved = run_folder.steps(tmp_path / "run")[-1]
        state = json.loads((run_folder.path_of(tmp_path / "run", saved) / "state.json").read_text())
        assert state["cursor"]["young"]
    assert launch(RECIPE + variant, [f"out={tmp_path / 'run'}"], True, False, console) == 0
    same(tmp_path / "whole", tmp_path / "run")
    steps = metrics(tmp_path / "run")
    assert all(line["mismatch_max"] < 1e-4 for line in steps), "at equal versions sampler and learner agree"
    assert any(line["ratio_max"] > 1.0001 for line in steps[1:]), "older tokens keep the log-prob of what sampled them"


def test_young_trees_are_finished_where_a_run_no_longer_looks_ahead() -> None:
    grown, engine, cursors = harvest(run_of())
    run = run_of(ahead=0)
    tasks = [Task(f"t{i}", (i, 2), "t") for i in range(2 * STEPS)]
    forests = Rollouts(run, tasks, engine, Stop((0,), 12), lambda tokens: "1" * len(tokens))
    second, cursor = asyncio.run(forests.get(2, cursor_of_json(cursors[0])))
    assert {tree.task.id for tree in second.grown} == {tree.task.id for tree in grown[1]}
    assert "young" not in cursor
    assert "asked" not in cursor
    third, _ = asyncio.run(forests.get(3, cursor))
    assert {tree.task.id for tree in third.grown} == {tree.task.id for tree in grown[2]}


def test_recomputed_is_refused_ahead() -> None:
    mix = Mix((Term(Estimator(Clip(column="recomputed"), Recomputed(), GroupMean())),))
    with pytest.raises(ValueError, match=r"ahead=1 .* Recomputed"):
        replace(rl(), mix=mix, ahead=1)


def test_only_one_step_ahead() -> None:
    with pytest.raises(ValueError, match=r"ahead is 0 .* or 1 .* got 2"):
        replace(rl(), ahead=2)
