"""A rank killed at every moment of a step, and the group begun again: the run ends bit for bit as one that nobody disturbed.

By torchrun itself twice; else by a process that has imported everything and begins the ranks as torchrun does, in a tenth of the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fork_server import fork_server
from ramulus.core import run_folder
from test_resume import metrics

HERE = Path(__file__).parent
WORDS = [f"{HERE / 'run_recipe.py'}:rl", "steps=3", "save_every=1", "eval_every=0", "optimizer.decay=constant", "learner=sharded", "--resume"]
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)]), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip
BY_TORCHRUN = [(0, "scoring", 2), (1, "writing shards", 2)]
KILLS = [
    (0, "growing", 3), (1, "waiting", 9), (1, "scoring", 2), (0, "learning", 4), (1, "learning", 4), (0, "stepping", 3), (1, "stepping", 3),
    (1, "gathering", 4), (0, "writing the model", 2), (0, "renaming", 2),
]  # fmt: skip
WATCHED = "import faulthandler; faulthandler.dump_traceback_later(250, exit=True); from torch.distributed.run import main; main()"
Lives = Callable[[Mapping[str, Any]], list[list[int]]]
pytestmark = pytest.mark.slow


def torchrun(out: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Two ranks, begun again once; the output is theirs."""
    launcher = [sys.executable, "-c", WATCHED, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    return subprocess.run([*launcher, *command, *WORDS, f"out={out}"], env=ENV, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = torchrun(out, "-m", "ramulus", "train")
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def ends(out: Path) -> dict[str, torch.Tensor]:
    """The last weights."""
    assert run_folder.steps(out)[-1] == 3
    return load_file(run_folder.path_of(out, 3) / "model" / "model.safetensors")


@pytest.mark.parametrize(("rank", "moment", "number"), BY_TORCHRUN)
def test_a_rank_that_is_killed_under_torchrun_changes_nothing(rank: int, moment: str, number: int, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = torchrun(out, str(HERE / "run_killed_rank.py"), str(rank), moment, str(number))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode: -9" in done.stderr or "Signal 9" in done.stderr or "restart" in done.stderr.lower(), "nobody was killed"
    compare(whole, out)


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    """Runs two ranks, begun again if one is killed; the statuses of each life's ranks."""
    with fork_server(HERE / "run_rank_server.py", ENV) as ask:
        yield ask


@pytest.mark.parametrize(("rank", "moment", "number"), KILLS)
def test_a_killed_rank_changes_nothing(rank: int, moment: str, number: int, whole: Path, lives: Lives, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    told = lives({"rank": rank, "moment": moment, "number": number, "words": [*WORDS, f"out={out}"], "log": str(log)})
    assert len(told) == 2, log.read_text()[-3000:]
    assert told[0][rank] == -9, "nobody was killed"
    assert told[1] == [0, 0], log.read_text()[-3000:]
    compare(whole, out)


def compare(whole: Path, out: Path) -> None:
    """The same weights and metrics, and nothing that a kill left lies about."""
    one, other = ends(whole), ends(out)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(whole) == metrics(out)
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.endswith(".part")]


def test_a_learner_of_one_process_is_refused_under_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ramulus", "train"]
    words = [WORDS[0], "steps=1", f"out={tmp_path / 'run'}"]
    done = subprocess.run([*launcher, *words], env=ENV, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "torchrun has started 2 processes, but rl learns in one: set learner=sharded, or leave torchrun out" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_a_rank_of_its_own_that_is_killed_is_named(tmp_path: Path) -> None:
    """Without torchrun the run ends with a sentence, and the same command goes on."""
    command = [sys.executable, "-m", "ramulus", "train", *WORDS, "learner.ranks=2", f"out={tmp_path / 'run'}"]
    trap = "import sys; from multiprocessing import process as p; "
    done = subprocess.run(
        [sys.executable, "-c", trap + KILLER, *command[3:]], env=ENV, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "rank 1 ended with status -9" in done.stderr
    assert subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=280, check=False).returncode == 0
    assert run_folder.steps(tmp_path / "run")[-1] == 3


KILLER = """
from ramulus.learn.sharded.sharded_learner import ShardedLearner
from ramulus.cli import main
real, calls = ShardedLearner._accumulate, []
def accumulate(self, *a):
    calls.append(1)
    if len(calls) == 3:
        self.world.processes[0].kill()
    return real(self, *a)
ShardedLearner._accumulate = accumulate
if __name__ == '__main__':
    main(sys.argv[1:])
"""
