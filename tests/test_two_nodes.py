"""A run on two machines: network namespaces with a raylet each, the doctor before it, and the trees of one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramulus.core.store import read
from two_nodes import NET, PORT, Nodes, clustered

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLUSTER = ("cluster=ray", f"cluster.address={NET}.1:{PORT}", "cluster.samplers=2")
WORDS = ("steps=2", "evals=none", "final_evaluation=none", "trees_every=1", "threads=1", "--fresh")


Forests = list[list[tuple[str, list[int]]]]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    pytest.importorskip("ray", reason="ray is not installed here")
    with clustered(cpus=(2, 1)) as made:  # the first has room for the trainer and one sampler
        yield made


def test_the_doctor_finds_two_machines_well(nodes: Nodes, tmp_path: Path) -> None:
    status, said = nodes.ramulus("doctor", "--cluster", "quickstart", *CLUSTER, "--shared", str(tmp_path))
    assert status == 0, said
    for words in ("node1 with", "node2 with", "2 machines reach each other", "read by all", "nothing that would break a run"):
        assert words in said


def test_the_doctor_finds_what_is_missing(nodes: Nodes) -> None:
    words = ("cluster=ray", f"cluster.address={NET}.1:{PORT}", "cluster.samplers=9", "cluster.gpus=1")
    status, said = nodes.ramulus("doctor", "--cluster", "quickstart", *words, "--shared", str(nodes.private))
    assert status == 2, said
    counts = ("3 CPUs in the cluster, the run reserves 10", "0 GPUs in the cluster, the run reserves 9")
    for missing in ("is not read (No such file or directory)", *counts):
        assert missing in said


@pytest.mark.parametrize("change", [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}], ids=["other", "none"])
def test_a_token_that_is_not_the_clusters_is_one_sentence(nodes: Nodes, change: dict[str, str]) -> None:
    words = nodes.inside(0, sys.executable, "-m", "ramulus", "doctor", "--cluster", "--address", f"{NET}.1:{PORT}")
    done = subprocess.run(words, env=nodes.environment | change, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert done.returncode == 2, done.stdout
    assert "give this shell the head's token: RAY_AUTH_MODE=token" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.fixture(scope="module")
def alone(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Forests:
    """What a run of one process grows."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "ramulus", "train", "quickstart", *WORDS, f"out={out}"]
    subprocess.run(command, env=nodes.environment, check=True, capture_output=True, timeout=400)
    return grown(out)


def test_a_run_on_two_machines_has_the_trees_of_one_process(nodes: Nodes, alone: Forests, tmp_path: Path) -> None:
    status, said = nodes.ramulus("train", "quickstart", *CLUSTER, *WORDS, f"out={tmp_path}/two")
    assert status == 0, said
    assert "2 samplers on 2 machines" in said
    assert "GB that are free for 1 rank and 1 sampler a step takes at most" in said
    assert grown(tmp_path / "two") == alone


def test_torchrun_learns_over_two_machines(nodes: Nodes, alone: Forests, tmp_path: Path) -> None:
    """Without Ray: each has half of one copy of the weights."""
    begun = []
    for i in (1, 0):
        there = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NET}.1:29500", "--rdzv-id", "two", "--rdzv-conf", f"is_host={1 - i}")
        there += ("--nnodes", "2", "--nproc-per-node", "1", "--local-addr", f"{NET}.{i + 1}")
        sharded = ("train", "quickstart", "learner=sharded", "learner.sharing=2", *WORDS, f"out={tmp_path}/two")
        command = nodes.inside(i, str(Path(sys.executable).with_name("torchrun")), *there, "-m", "ramulus", *sharded)
        environment = nodes.environment | {"GLOO_SOCKET_IFNAME": nodes.devices[i]}
        begun.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=400)[0] for process in begun]
    assert [process.returncode for process in begun] == [0, 0], said
    assert len(list((tmp_path / "two" / "2-treepo" / "checkpoints" / "step-000002" / "shards").glob("*.distcp"))) == 2
    assert grown(tmp_path / "two") == alone


def grown(out: Path) -> Forests:
    """Problems and tokens of the forests of a run's second stage."""
    files = [out / "2-treepo" / "trees" / f"{step:06}.jsonl" for step in (1, 2)]
    return [[(tree.task.id, [token for node in tree.walk() for token in node.tokens]) for tree in read(file)] for file in files]
