"""Runs that sample in a server of its own: the same as here, bit for bit, also where the server is killed on the way."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run_small
from engines import KERNELS
from ramulus.engine.engine import Request, Segment
from ramulus.engine.remote.client import RemoteEngine
from ramulus.run.launch import launch
from served import TOKEN, Server, served
from test_resume import metrics, tensors

RECIPE = str(Path(__file__).parent / "run_remote.py")
VARIANTS = ("grpo", "treepo", "attnrl", "hapo")
COUNTED = ("prefilled", "prefix_reused", "rows")  # what depends on which calls meet in the server
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_as_it_was"), KERNELS]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the model that the recipes train."""
    folder = tmp_path_factory.mktemp("model")
    for part in run_small.FIRST.model():  # type: ignore[operator]
        part.save_pretrained(folder)
    with served(str(folder)) as one:
        yield one


def train(variant: str, out: Path, monkeypatch: pytest.MonkeyPatch, server: Server | None, *changes: str) -> None:
    """A run, by way of a server where there is one."""
    monkeypatch.setenv("RAMULUS_URL", server.url if server else "")
    monkeypatch.setenv("RAMULUS_TOKEN", TOKEN)
    assert launch(f"{RECIPE}:{variant}", [f"out={out}", *changes], True, False, Console(quiet=True)) == 0


def learned(folder: Path) -> list[dict[str, Any]]:
    """The metrics but for what the engine says of its work."""
    return [{name: value for name, value in line.items() if not name.startswith(COUNTED)} for line in metrics(folder)]


def equal(one: Path, other: Path) -> None:
    """Metrics, trees, weights and optimizer are those of the other run."""
    assert learned(one) == learned(other)
    for path in (one / "trees").iterdir():
        assert path.read_bytes() == (other / "trees" / path.name).read_bytes()
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_learns_through_a_server_what_it_learns_here(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    train(variant, tmp_path / "here", monkeypatch, None)
    train(variant, tmp_path / "there", monkeypatch, server)
    assert sum(line["updates"] > 0 for line in metrics(tmp_path / "there")) >= 3
    equal(tmp_path / "here", tmp_path / "there")
    saved = (tmp_path / "there" / "run.json").read_text() + (tmp_path / "there" / "recipe.py").read_text()
    assert server.url in saved
    assert TOKEN not in saved


@pytest.mark.parametrize("variant", ["grpo", "hapo"])
def test_a_server_killed_and_started_again_changes_nothing(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    train(variant, tmp_path / "whole", monkeypatch, server)
    first = server.process.pid if server.process else 0
    real, calls = RemoteEngine.sample, 0

    async def sample(self: RemoteEngine, requests: Sequence[Request]) -> list[Segment]:
        """As it is; the server dies while the first call after the second step is on its way, and comes back half a second later."""
        nonlocal calls
        lines = (tmp_path / "killed" / "metrics.jsonl").read_text().count("\n")
        if lines == 2 and not calls:
            calls += 1
            asyncio.get_running_loop().call_later(0.01, server.signal, signal.SIGKILL)
            threading.Timer(0.5, server.start).start()
        return await real(self, requests)

    monkeypatch.setattr(RemoteEngine, "sample", sample)
    train(variant, tmp_path / "killed", monkeypatch, server)
    assert server.process is not None
    assert server.process.pid != first
    equal(tmp_path / "whole", tmp_path / "killed")


def test_a_run_that_lost_its_server_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    train("grpo", tmp_path / "whole", monkeypatch, server)
    real = RemoteEngine.sample

    async def sample(self: RemoteEngine, requests: Sequence[Request]) -> list[Segment]:
        self.reconnect = 0.2
        if (tmp_path / "lost" / "metrics.jsonl").read_text().count("\n") == 2 and server.process is not None:
            server.signal(signal.SIGKILL)
            server.process = None
        return await real(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteEngine, "sample", sample)
        with pytest.raises(ConnectionError, match="no engine server answers"):
            train("grpo", tmp_path / "lost", monkeypatch, server)
    assert len(metrics(tmp_path / "lost")) == 2
    server.start()
    train("grpo", tmp_path / "lost", monkeypatch, server)
    equal(tmp_path / "whole", tmp_path / "lost")
