"""What a stage refuses before any work: settings that would train nothing, or other paths than are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import run_forks
import run_value
from ramulus import Ray
from ramulus.grow.branching import Star
from ramulus.grow.demonstration import Hinted
from ramulus.grow.segments import Segments
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.run.config.recipe import Run
from ramulus.run.launch import launch
from ramulus.run.stage import check_grown_ahead, check_schedule, check_signals


@pytest.mark.parametrize("rule", [Star(4), Hinted(Star(4), 2), Hinted(Hinted(Star(4)))])
def test_an_adaptive_schedule_wants_a_rule_that_branches(rule: object) -> None:
    run = run_forks.recipe()
    check_schedule(run)
    with pytest.raises(
        ValueError, match=r"Star\(n=4\) never branches, so that every tree would be dropped: .*unbranched=True"
    ):
        check_schedule(replace(run, branching=rule))
    check_schedule(trained_alone(replace(run, branching=rule)))
    check_schedule(replace(run, branching=Hinted(Segments(4, 2, 4, branching=2))))


def trained_alone(run: Run) -> Run:
    """With paths that nothing branches from trained."""
    plain = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
    return replace(run, schedule=replace(run.schedule, unbranched=True), mix=plain)


def test_the_schedule_and_the_advantage_train_the_same_paths(tmp_path: Path) -> None:
    recipe = str(Path(run_forks.__file__))
    with pytest.raises(
        ValueError, match=r"schedule has unbranched=True and GlobalLocal unbranched=False.*set both alike"
    ):
        launch(recipe, [f"out={tmp_path / 'run'}", "schedule.unbranched=true"], False, False, Console(quiet=True))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    check_schedule(trained_alone(run_forks.recipe()))


def test_trees_that_grow_ahead_ask_no_learner() -> None:
    run = replace(run_value.plain(), cluster=Ray(ahead=1))
    check_grown_ahead(run, asks_learner=False)
    with pytest.raises(ValueError, match=r"with cluster.ahead=1 .* it computes the entropies that the engine lacks: set cluster.ahead=0"):
        check_grown_ahead(run, asks_learner=True)


def test_a_value_needs_a_head() -> None:
    check_signals(run_value.pruned())
    check_signals(run_value.plain())
    with pytest.raises(ValueError, match="trains no value head"):
        check_signals(run_value.headless())
