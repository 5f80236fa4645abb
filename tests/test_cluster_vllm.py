"""Runs whose samplers are vLLM servers below actors of Ray: weights by both ways, swaps below what grows, a server killed on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engines import KERNELS
from ramulus import Ray
from ramulus.core import store
from ramulus.core.tree import Author, Node
from ramulus.run.cluster import RayCarrier, connected
from run_cluster_kills import below, of_ray
from test_resume import metrics
from test_vllm_training import grown, train
from vllm_servers import HERE, NEEDS

ROOM = Ray(samplers=2, store_mb=150)
pytestmark = [*NEEDS, pytest.mark.usefixtures("torch_as_it_was"), KERNELS]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray on this machine; whatever it and its samplers have started is gone afterwards."""
    pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)])
    os.environ["RAMULUS_VLLM_PYTHON"], os.environ["RAMULUS_URLS"] = str(HERE.absolute()), ""
    before = cores()
    with connected(ROOM):
        yield
        end = time.monotonic() + 20.0
        while cores() - before and time.monotonic() < end:
            time.sleep(0.2)
        assert not cores() - before, "a server's own processes outlive its sampler"
    assert not of_ray(os.getpid()), "processes of Ray are left"


def cores() -> set[str]:
    """The processes of vLLM's engines, wherever they hang."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found |= {path.name} if (path / "cmdline").read_bytes().startswith(b"VLLM::") else set()
    return found


def holds(rows: list[dict[str, Any]]) -> None:
    """The ledger's identities: what was sampled is in trees, here or ahead, or thrown away; sampler and learner agree at equal weights."""
    for row in rows:
        assert row["sampled"] > 0
        assert row["engine_sampled"] - row["thrown_away"] == row["sampled"] - row["sampled_before"] + row["sampled_ahead"]
        if row["updates"]:
            assert row["mismatch_max"] < 1e-4


def nodes(out: Path) -> list[Node]:
    """What was sampled."""
    trees = [tree for path in sorted((out / "trees").glob("*.jsonl")) for tree in store.read(path)]
    return [node for tree in trees for node in tree.walk() if node.author is Author.POLICY and node.logprobs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GRPO with one sampler, its weights by the object store."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train("grpo", out, "cluster=ray")
    return out


def test_grpo_trains_through_one_sampler(whole: Path) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sum(row["updates"] for row in rows) >= 2
    holds(rows)
    assert {node.version for node in nodes(whole)} > {0}


DIRECT = ("cluster.weights=direct", "engine.weights=gloo")


@pytest.mark.parametrize("words", [("cluster.weights=files",), ("engine.weights=gloo",), DIRECT])
def test_two_samplers_grow_the_same_trees_however_weights_come(words: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    train("grpo", tmp_path, "cluster=ray", "cluster.samplers=2", f"cluster.folder={tmp_path / 'weights'}", *words)
    assert grown(tmp_path) == grown(whole)
    rows = metrics(tmp_path)
    holds(rows)
    names = ("sampled", "trained", "updates", "reward", "engine_sampled", "paths")
    assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in metrics(whole)]


@pytest.mark.parametrize("words", [(), DIRECT])
def test_weights_are_swapped_below_what_grows_ahead_and_nodes_say_which_sampled_what(words: tuple[str, ...], tmp_path: Path) -> None:
    more = ("steps=6", "cluster.samplers=2", "cluster.ahead=1", "engine.in_flight=true", "response_limit=200", *words)
    rows = train("grpo", tmp_path, "cluster=ray", *more)
    assert len(rows) == 6
    holds(rows)
    mixed = [node for node in nodes(tmp_path) if node.version < node.newest]
    assert mixed, "no swap came below a node"
    for node in mixed:
        assert node.versions is not None
        assert len(node.versions) == len(node.tokens)
        assert (node.versions[0], node.versions[-1]) == (node.version, node.newest)
        assert sorted(node.versions) == list(node.versions)


STRUCK = [("ramulus_vllm.serve", "it is started again"), ("ray::SamplerProcess", "another is started in its place")]


@pytest.mark.parametrize("words", [(), DIRECT])
@pytest.mark.parametrize(("part", "said"), STRUCK)
def test_a_server_or_its_sampler_that_is_killed_is_started_again_and_nothing_changes(
    part: str, said: str, words: tuple[str, ...], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, struck = RayCarrier.stream, list[int]()

    def stream(self: RayCarrier, process: Any, requests: Any, loaded: str) -> Any:
        """As it is; one process dies while the first call after the first step is on its way."""
        if not struck and (tmp_path / "metrics.jsonl").read_text().count("\n") == 1:
            struck.extend(one for one, name in below(os.getpid()).items() if part in name)
            assert len(struck) == 1
            asyncio.get_running_loop().call_later(0.01, os.kill, struck[0], signal.SIGKILL)
        return real(self, process, requests, loaded)

    monkeypatch.setattr(RayCarrier, "stream", stream)
    with pytest.warns(UserWarning, match=f"{said}, and what it had not answered is asked again"):
        train("grpo", tmp_path, "cluster=ray", *words)
    assert struck
    assert grown(tmp_path) == grown(whole)
    holds(metrics(tmp_path))
