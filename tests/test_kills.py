"""A hundred kills over every recipe, at seeded moments of the work: every run ends bit-equal to one that nobody killed."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fork_server import fork_server
from ramulus.core import run_folder
from ramulus.core.run_folder import stage_folders
from test_recipes_run import ONE_STAGE
from test_resume import ENV, same

HERE = Path(__file__).parent
RECIPE = str(HERE / "run_small.py")
KILLS = 8  # of each recipe
RECIPES = (*ONE_STAGE, "sft_then_grpo")
pytestmark = pytest.mark.slow
Serve = Callable[[str, Path, int], dict]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Runs a recipe in a fork of a process that has imported everything, killed at a tick; 0 lets it live."""
    env = ENV | {"PYTHONPATH": os.pathsep.join([str(HERE), ENV["PYTHONPATH"]])}
    with fork_server(HERE / "run_kill_server.py", env) as ask:

        def run(variant: str, out: Path, kill_at: int) -> dict:
            steps = ["steps=5", "save_every=2", "keep=2"]
            return ask({"recipe": f"{RECIPE}:{variant}", "out": str(out), "overrides": steps, "kill_at": kill_at})

        yield run


@pytest.mark.parametrize("variant", RECIPES)
def test_killed_again_and_again(serve: Serve, tmp_path: Path, variant: str):
    told = serve(variant, tmp_path / "whole", 0)
    assert told.get("status") == 0, told
    dice, kills, run = random.Random(variant), 0, 0
    while True:
        out = tmp_path / f"run-{run}"
        told = serve(variant, out, dice.randint(1, told["ticks"] // 3) if kills < KILLS else 0) | {"ticks": told["ticks"]}
        if told["ended"] == -signal.SIGKILL:
            kills += 1
            continue
        assert told.get("status") == 0, told
        compare(tmp_path / "whole", out)
        run += 1
        if kills >= KILLS:
            return


def compare(whole: Path, out: Path) -> None:
    """Every stage, bit for bit; nothing that a kill left lies about."""
    stages = [Path(), *(stage.relative_to(whole) for stage in stage_folders(whole))]
    for stage in (stage for stage in stages if run_folder.steps(whole / stage)):
        same(whole / stage, out / stage)
        assert run_folder.steps(whole / stage) == run_folder.steps(out / stage)
    assert not [path for path in out.rglob("*.part") if path.parent.name == "checkpoints"]
