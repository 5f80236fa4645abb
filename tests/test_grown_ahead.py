"""Whole steps grown ahead: which version samples what, that nothing is thrown away, and that a cursor at rest goes on alike."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from ramulus import Ray
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.grow.stop import Stop
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Recomputed
from ramulus.run.ahead import RIPE, AheadRollouts, cost_of, ripe_of_json, ripe_to_json
from ramulus.run.rollouts import START, Rollout, Rollouts
from test_ahead import STEPS, Crowd, run_of, sampled

TASKS = [Task(f"t{i}", (i, 2), "t") for i in range(2 * STEPS)]


def texts(trees: list[Tree]) -> list[list[list[int]]]:
    return [[list(node.tokens) for node in sampled(tree)] for tree in trees]


async def steps(most: int, cut: int = 0) -> tuple[list[Rollout], Crowd]:
    """Every step's rollout, as the trainer asks for them; after the step `cut` what was at rest goes on in another process."""
    engine = Crowd()

    def begun() -> AheadRollouts:
        return AheadRollouts(Rollouts(run_of(ahead=0), TASKS, engine, Stop((0,), 12), lambda tokens: "1" * len(tokens)), most, STEPS)

    rollouts, cursor, told = begun(), dict(START), []
    for step in range(1, STEPS + 1):
        rollout, after = await rollouts.get(step, cursor)
        rollout, cursor = await rollouts.settled(rollout, after)
        told.append(rollout)
        await engine.load(None, step)
        if step == cut:
            rollouts, cursor = begun(), ripe_of_json(json.loads(json.dumps(ripe_to_json(cursor))))
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
        rollouts = AheadRollouts(Rollouts(run_of(ahead=0), TASKS, engine, Stop((0,), 12), lambda tokens: "1" * len(tokens)), 1, STEPS)
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


def test_a_reference_that_would_take_old_tokens_for_new_is_refused() -> None:
    changes: dict[str, Any] = {"mix": Mix((Term(Estimator(Clip(column="recomputed"), Recomputed(), GroupMean())),))}
    with pytest.raises(ValueError, match="trains tokens that an older version sampled"):
        run_of(ahead=0, cluster=Ray(ahead=2), **changes)
    with pytest.raises(ValueError, match="set one of the two to 0"):
        run_of(ahead=1, cluster=Ray(ahead=1))
    assert run_of(ahead=0, cluster=Ray(ahead=2)).cluster == Ray(ahead=2)
