"""Whole steps grown ahead: which version samples what, that nothing is thrown away, and that a cursor at rest goes on alike."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ramulus import Ray
from ramulus.core import run_folder
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Recomputed
from ramulus.run import train_stage
from ramulus.run.ahead import RIPE, AheadRollouts, cost_of, ripe_of_json, ripe_to_json
from ramulus.run.launch import launch
from ramulus.run.rollouts import START, Cursor, Rollout, Rollouts
from ramulus.run.trainer import Clock
from test_ahead import STEPS, Crowd, run_of, sampled

TASKS = [Task(f"t{i}", (i, 2), "t") for i in range(2 * STEPS)]


def texts(trees: list[Tree]) -> list[list[list[int]]]:
    return [[list(node.tokens) for node in sampled(tree)] for tree in trees]


def ahead(engine: Crowd, most: int) -> AheadRollouts:
    return AheadRollouts(Rollouts(run_of(ahead=0), TASKS, engine, Stop((0,), 12), lambda tokens: "1" * len(tokens)), most, STEPS)


async def steps(most: int, cut: int = 0) -> tuple[list[Rollout], Crowd]:
    """Every step's rollout, as the trainer asks for them; after the step `cut` what was at rest goes on in another process."""
    engine = Crowd()

    rollouts, cursor, told = ahead(engine, most), dict(START), []
    for step in range(1, STEPS + 1):
        rollout, after = await rollouts.get(step, cursor)
        rollout, cursor = await rollouts.settled(rollout, after)
        told.append(rollout)
        await engine.load(None, step)
        if step == cut:
            rollouts, cursor = ahead(engine, most), ripe_of_json(json.loads(json.dumps(ripe_to_json(cursor))))
    assert RIPE not in cursor, "nothing is grown beyond the last step"
    return told, engine


@pytest.mark.parametrize("most", [0, 1, 2, 9])
def test_trees_are_as_old_as_was_said_and_every_token_is_of_a_step(most: int) -> None:
    told, engine = asyncio.run(steps(most))
    for step, rollout in enumerate(told, 1):
        assert {node.version for tree in rollout.grown for node in sampled(tree)} == {max(step - 1 - most, 0)}
        assert all(tree.step == step for tree in rollout.grown)
        assert rollout.before == (cost_of(rollout) if most and step > 1 else 0)
    assert engine.counters()["sampled"] == sum(map(cost_of, told)) == sum(cost_of(r) - r.before + r.ahead for r in told)
    assert len(engine.together) > 0


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 2])
def test_what_was_at_rest_goes_on_with_the_same_trees(most: int, cut: int) -> None:
    whole, _ = asyncio.run(steps(most))
    again, engine = asyncio.run(steps(most, cut))
    assert [texts(r.grown) for r in again] == [texts(r.grown) for r in whole]
    assert [replace(r, grown=[], grading=0.0) for r in again] == [replace(r, grown=[], grading=0.0) for r in whole]
    assert engine.counters()["sampled"] == sum(map(cost_of, whole)), "nothing was sampled twice"


def test_a_step_that_fails_leaves_the_trees_that_were_ripe() -> None:
    async def story() -> None:
        engine = Crowd()
        rollouts = ahead(engine, 1)
        _, cursor = await rollouts.settled(*await rollouts.get(1, dict(START)))
        ripe = [texts(rollout.grown) for rollout, _ in cursor[RIPE]]
        await rollouts.get(2, cursor)
        await asyncio.sleep(0)
        await rollouts.abandon()
        assert [texts(rollout.grown) for rollout, _ in cursor[RIPE]] == ripe
        second, _ = await rollouts.get(2, cursor)
        assert texts(second.grown) == ripe[0]
        await rollouts.abandon()

    asyncio.run(story())


@pytest.mark.parametrize("later", [0, 1, 2])
def test_what_was_ripe_is_learned_from_where_a_run_looks_less_far_ahead(later: int) -> None:
    async def story() -> None:
        engine = Crowd()
        cursor: Cursor = dict(START)
        grown, most = [], 3
        for step in range(1, STEPS + 1):
            rollouts = ahead(engine, most)
            rollout, after = await rollouts.get(step, cursor)
            assert len(after.get(RIPE, ())) >= len(cursor.get(RIPE, ())) - 1, "what is ripe is in the cursor from the beginning"
            rollout, cursor = await rollouts.settled(rollout, after)
            cursor = ripe_of_json(json.loads(json.dumps(ripe_to_json(cursor))))
            grown.append(rollout)
            most = later
        assert [texts(r.grown) for r in grown] == [texts(r.grown) for r in whole]
        assert engine.counters()["sampled"] == sum(map(cost_of, grown)) == sum(cost_of(r) - r.before + r.ahead for r in grown)
        assert RIPE not in cursor

    whole, _ = asyncio.run(steps(0))
    asyncio.run(story())


class Astray(Exception):
    """What goes wrong in a test."""


@pytest.mark.parametrize("features", [frozenset(), frozenset({"in_flight"})])
@pytest.mark.parametrize("wrong", ["growing", "loading", "cancelled"])
@pytest.mark.parametrize("fails", [2, 3, 4])
def test_only_what_still_grew_is_lost_where_growing_or_loading_fails(fails: int, wrong: str, features: frozenset[str]) -> None:
    async def story() -> None:
        engine = Crowd()
        engine.features |= features
        rollouts = ahead(engine, 3)
        get, stuck, grown = rollouts.rollouts.get, asyncio.Event(), set[int]()

        async def astray(step: int, cursor: Cursor) -> tuple[Rollout, Cursor]:
            if step == fails and wrong != "loading":
                stuck.set()
                await asyncio.sleep(3600 if wrong == "cancelled" else 0)
                raise Astray
            answer = await get(step, cursor)
            grown.add(step)
            return answer

        async def load() -> None:
            if wrong == "loading":
                while not grown >= {2, 3, 4}:  # grading has threads of its own: it takes as long as it takes
                    await asyncio.sleep(0.001)
                for _ in range(100):
                    await asyncio.sleep(0)
                raise Astray

        rollouts.rollouts.get = astray  # type: ignore[method-assign]
        first = await rollouts.get(1, dict(START))
        renewing = asyncio.create_task(rollouts.renewed(*first, engine, load, Clock()))
        if wrong == "cancelled":
            await stuck.wait()
            renewing.cancel()
        with pytest.raises((Astray, asyncio.CancelledError)):
            await renewing
        rollout, cursor = rollouts.with_ripe(*first)
        await rollouts.abandon()
        ripe = [other for other, _ in cursor[RIPE]] if RIPE in cursor else []
        assert len(ripe) == (3 if wrong == "loading" else fails - 2)
        assert rollout.ahead == sum(map(cost_of, ripe)), "its row counts what was sampled for later steps"
        rollouts.rollouts.get = get  # type: ignore[method-assign]
        for step in range(2, STEPS + 1):
            rollout, cursor = await rollouts.settled(*await rollouts.get(step, cursor))
            assert texts(rollout.grown) == texts(whole[step - 1].grown)
        assert RIPE not in cursor

    whole, _ = asyncio.run(steps(0))
    asyncio.run(story())


@pytest.mark.parametrize("later", [0, 2])
def test_a_run_whose_growing_fails_saves_what_is_ripe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int) -> None:
    """The update of the step is made, so what has ripened meanwhile is in the checkpoint, and whoever goes on learns from it."""
    asked: list[int] = []

    async def astray(self: Rollouts, step: int, cursor: Cursor) -> tuple[Rollout, Cursor]:
        asked.append(step)
        if asked.count(4) == 1 and step == 4:
            raise OSError("growing went astray")
        return await get(self, step, cursor)

    get, far = Rollouts.get, [2]
    monkeypatch.setattr(Rollouts, "get", astray)
    monkeypatch.setattr(train_stage, "AheadRollouts", lambda rollouts, most, last: AheadRollouts(rollouts, far[0], last))
    recipe = str(Path(__file__).parent / "run_recipe.py")
    words = [f"out={tmp_path}", "evals=null", "eval_every=0"]
    with pytest.raises(OSError, match="went astray"):
        launch(recipe, words, True, False, Console(quiet=True))
    saved = run_folder.steps(tmp_path)[-1]
    cursor = run_folder.state_of(run_folder.path_of(tmp_path, saved))["cursor"]
    assert (saved, [rollout["grown"] != [] for rollout, _ in cursor[RIPE]]) == (2, [True])
    asked.clear()
    far[0] = later
    asked.append(4)
    assert launch(recipe, words, True, False, Console(quiet=True)) == 0
    assert asked[1:] == [4, 5, 6], "step 3 is not grown again"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["thrown_away"] for row in rows] == [0] * 6


def test_a_reference_that_would_take_old_tokens_for_new_is_refused() -> None:
    changes: dict[str, Any] = {"mix": Mix((Term(Estimator(Clip(column="recomputed"), Recomputed(), GroupMean())),))}
    with pytest.raises(ValueError, match="trains tokens that an older version sampled"):
        run_of(ahead=0, cluster=Ray(ahead=2), **changes)
    with pytest.raises(ValueError, match="set one of the two to 0"):
        run_of(ahead=1, cluster=Ray(ahead=1))
    assert run_of(ahead=0, cluster=Ray(ahead=2)).cluster == Ray(ahead=2)
