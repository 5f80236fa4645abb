"""Runs on a cluster of Ray, one for all tests of this file: token for token and bit for bit what one process does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engines import KERNELS
from ramulus import Ray
from ramulus.core import run_folder
from ramulus.native.memory import free_memory
from ramulus.run.cluster import Ground, connected, join
from ramulus.run.config.resume import build
from ramulus.run.launch import launch
from ramulus.run.memory.rooms import rooms_of
from run_cluster_kills import of_ray
from test_remote_training import equal
from test_resume import metrics

RECIPE = str(Path(__file__).parent / "run_cluster.py")
ROOM = Ray(samplers=3, trainers=2, store_mb=150)  # what the tests need at once
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_as_it_was"), KERNELS]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray on this machine; whatever it has started is gone afterwards."""
    pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)])
    with connected(ROOM):
        yield
    assert not of_ray(os.getpid()), "processes of Ray are left"


def train(variant: str, out: Path, *changes: str) -> Path:
    assert launch(f"{RECIPE}:{variant}", [f"out={out}", *changes], True, False, Console(quiet=True)) == 0
    return out


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process, each made once."""
    made: dict[str, Path] = {}

    class Runs(dict):
        def __missing__(self, words: str) -> Path:
            self[words] = train(*words.split()[:1], tmp_path_factory.mktemp("here") / "run", *words.split()[1:])
            return self[words]

    return Runs(made)


@pytest.mark.parametrize(("variant", "samplers"), [("grpo", 1), ("grpo", 2), ("treepo", 1), ("treepo", 2), ("hapo", 2), ("attnrl", 2)])
def test_the_trees_and_the_update_are_those_of_one_process(variant: str, samplers: int, tmp_path: Path, here: dict[str, Path]) -> None:
    there = train(variant, tmp_path / "there", "cluster=ray", f"cluster.samplers={samplers}")
    assert sum(line["updates"] > 0 for line in metrics(there)) >= 2
    assert all(line["thrown_away"] == 0 for line in metrics(there))
    equal(here[variant], there)


@pytest.mark.parametrize("words", ["cluster.weights=files", "cluster.colocated=true"])
def test_so_they_are_however_weights_travel_and_samplers_rest(words: str, tmp_path: Path, here: dict[str, Path]) -> None:
    equal(here["treepo"], train("treepo", tmp_path / "there", "cluster=ray", "cluster.samplers=2", words))


def test_two_ranks_that_ray_placed_learn_what_two_of_this_machine_learn(tmp_path: Path, here: dict[str, Path]) -> None:
    there = train("grpo", tmp_path / "there", "learner=sharded", "cluster=ray", "cluster.trainers=2")
    for mine, theirs in zip(metrics(here["grpo learner=sharded learner.ranks=2"]), metrics(there), strict=True):
        assert mine["grad_norm"] == theirs["grad_norm"]
        assert mine["reward"] == theirs["reward"]


@pytest.mark.parametrize("most", [1, 2])
def test_trees_grown_ahead_are_as_old_as_was_said_and_a_run_goes_on_with_them(most: int, tmp_path: Path) -> None:
    words = ["steps=5", "cluster=ray", "cluster.samplers=2", f"cluster.ahead={most}"]
    whole = train("grpo", tmp_path / "whole", *words)
    rows = metrics(whole)
    for row in rows:
        assert row["thrown_away"] == 0
        assert row["engine_sampled"] == row["sampled"] - row["sampled_before"] + row["sampled_ahead"]
        assert row["sampled_before"] == (row["sampled"] if row["step"] > 1 else 0)
    shutil.copytree(whole, tmp_path / "cut")
    for step in (3, 4, 5):
        shutil.rmtree(run_folder.path_of(tmp_path / "cut", step))
    equal(whole, train("grpo", tmp_path / "cut", *words))


def test_a_run_knows_who_shares_its_machine() -> None:
    [run] = build(f"{RECIPE}:grpo", ["cluster=ray", "cluster.samplers=2", "cluster.trainers=2", "learner=sharded"])[0]
    ground = Ground(run.cluster)
    try:
        ground.reserve()
        [here] = ground.machines()
        [room] = rooms_of(run, "cpu", [here])
    finally:
        ground.leave()
    assert (here.trainers, here.samplers) == (2, 2)
    assert here.free == pytest.approx(free_memory(), rel=0.2)
    assert room.spelled == " for 2 ranks and 2 samplers"


def test_a_cluster_that_is_too_small_is_named(tmp_path: Path) -> None:
    words = r"the run wants 2 CPUs and 1 GPUs of the Ray cluster, which has \d+ CPUs and 0 GPUs: add machines"
    with pytest.raises(ValueError, match=words) as caught:
        train("grpo", tmp_path / "run", "cluster=ray", "cluster.gpus=1")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "run.json").exists(), "before any work"


def test_a_cluster_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.utils import check_version_info

    def init(*_: object, **__: object) -> None:
        """What a real one does first."""
        there = {"ray_version": "1.0.0", "python_version": "3.6.0"}
        check_version_info(there, "this process", raise_on_mismatch=True)

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match=r"the Ray cluster at auto has other versions \(.*1\.0\.0.*\): install the same on all machines"):
        join(Ray(address="auto"))
