"""Runs that sample with vLLM: every kind of recipe for a few steps, and what happens when their server is killed on the way."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run_small
from ramulus.core import store
from ramulus.core.tree import Author
from ramulus.engine.engine import Request, Segment
from ramulus.engine.vllm.process import Process
from ramulus.engine.vllm.vllm_engine import VllmEngine
from ramulus.models.smollm2 import fetch
from ramulus.run.launch import launch
from test_resume import metrics
from vllm_servers import HERE, NEEDS, process_of

pytestmark = [*NEEDS, pytest.mark.usefixtures("torch_as_it_was")]
RECIPE = str(Path(__file__).parent / "run_vllm.py")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    """A server of the model that the recipes train."""
    process = process_of("quickstart", run_small.FIRST.model()[0])  # type: ignore[operator]
    monkeypatch.setenv("RAMULUS_URLS", process.url)
    monkeypatch.setenv("RAMULUS_VLLM_KEY", process.key)
    return process


def train(variant: str, out: Path, *changes: str) -> list[dict[str, Any]]:
    """A run; its metrics."""
    assert launch(f"{RECIPE}:{variant}", [f"out={out}", *changes], True, False, Console(quiet=True)) == 0
    return metrics(out)


@pytest.mark.parametrize("variant", ["grpo", "treepo", "attnrl", "hapo", "hpt", "corrected"])
def test_a_recipe_trains_through_it(variant: str, process: Process, tmp_path: Path) -> None:
    lines = train(variant, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert sum(line["updates"] for line in lines) >= 2
    for line in lines:
        assert line["sampled"] > 0
        assert line["engine_sampled"] - line["thrown_away"] == line["sampled"] - line["sampled_before"] + line["sampled_ahead"]
        assert line["mismatch_max"] < 1e-4, "at equal weights sampler and learner agree"
        assert 0 <= line["mismatch"] <= line["mismatch_max"]
        assert line["mismatch_share"] == 0
        assert abs(line["mismatch_kl"]) < 1e-6
    trees = [tree for path in sorted((tmp_path / "trees").glob("*.jsonl")) for tree in store.read(path)]
    nodes = [node for tree in trees for node in tree.walk() if node.author is Author.POLICY and node.logprobs]
    assert {node.version for node in nodes} > {0}
    if variant == "hapo":
        assert all(node.entropy is not None and len(node.entropy) == len(node.tokens) for node in nodes)
        heats = [node.temperature for node in nodes if not isinstance(node.temperature, float)]
        assert any(max(heat) > min(heat) for heat in heats)


@pytest.mark.timeout(1800)
def test_ten_steps_of_grpo_on_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        model = fetch()
    except RuntimeError as error:
        pytest.skip(f"SmolLM2-135M-Instruct cannot be had here: {error}")
    monkeypatch.setenv("RAMULUS_VLLM_PYTHON", str(HERE.absolute()))
    lines = train("smol", tmp_path, f"model={model}")
    assert len(lines) == 10
    assert sum(line["updates"] for line in lines) >= 5
    assert all(line["mismatch"] < 0.05 for line in lines if line["updates"])


def grown(out: Path) -> list[list[int]]:
    """The sampled tokens of a run, node by node."""
    trees = [tree for path in sorted((out / "trees").glob("*.jsonl")) for tree in store.read(path)]
    return [node.tokens.tolist() for tree in trees for node in tree.walk() if node.author is Author.POLICY]


def test_a_server_killed_in_a_run_loses_nothing_and_trains_nothing_twice(process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = train("grpo", tmp_path / "whole")
    monkeypatch.setenv("RAMULUS_URLS", "")
    monkeypatch.setenv("RAMULUS_VLLM_PYTHON", str(HERE.absolute()))
    real, struck = VllmEngine.sample, list[int]()

    async def sample(self: VllmEngine, requests: Sequence[Request]) -> list[Segment]:
        """As it is; its server dies while the first call after the first step is on its way."""
        if not struck and (tmp_path / "killed" / "metrics.jsonl").read_text().count("\n") == 1:
            [running] = [server.process.running for server in self.servers if server.process is not None]
            assert running is not None
            struck.append(running.pid)
            asyncio.get_running_loop().call_later(0.01, os.killpg, running.pid, signal.SIGKILL)
        return await real(self, requests)

    monkeypatch.setattr(VllmEngine, "sample", sample)
    with pytest.warns(UserWarning, match="it is started again, and what it had not answered is asked again"):
        lines = train("grpo", tmp_path / "killed")
    assert struck
    assert grown(tmp_path / "killed") == grown(tmp_path / "whole")
    names = ("sampled", "trained", "updates", "reward", "thrown_away", "engine_sampled", "paths")
    assert [[line[name] for name in names] for line in lines] == [[line[name] for name in names] for line in undisturbed]
