"""Runs that sample with vLLM: every kind of recipe for a few steps, and what happens when their server is killed on the way."""

from __future__ import annotations

import asyncio
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


def kill_once(monkeypatch: pytest.MonkeyPatch, out: Path, after: int, blow: Any) -> list[int]:
    """Strike once, while the first call after so many steps is on its way; when that was."""
    real, struck = VllmEngine.sample, list[int]()

    async def sample(self: VllmEngine, requests: Sequence[Request]) -> list[Segment]:
        lines = (out / "metrics.jsonl").read_text().count("\n")
        if lines == after and not struck:
            struck.append(lines)
            asyncio.get_running_loop().call_later(0.02, blow)
        return await real(self, requests)

    monkeypatch.setattr(VllmEngine, "sample", sample)
    return struck


