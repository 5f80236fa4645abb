"""A vocabulary with more rows than the tokenizer has tokens: ids of nothing are neither drawn nor trained, unless asked for."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ramulus.core.task import Task
from ramulus.core.tree import Author, Tree
from ramulus.engine.engine import Request, Sampling
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.lora import Lora
from ramulus.learn.policy.model import Pretrained, Scratch
from ramulus.learn.policy.torch_policy import TorchPolicy
from tiny import build

START = Scratch("0123456789+=? \n", hidden=16, layers=1, heads=2, kv_heads=1)
WAYS = {"compiled": {}, "fused": {"native": False}, "model": {"fast": False, "native": False}}


@pytest.fixture(scope="module", params=["qwen2", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 rows whose padding would win nearly every draw, with a tokenizer of far fewer tokens."""
    path = tmp_path_factory.mktemp(request.param)
    _, tokenizer = START()
    model = build("qwen2", vocab_size=64, hidden_size=16, intermediate_size=32, tie_word_embeddings=request.param == "tied")
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tokenizer) :] *= 30
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def sampled(model: Any, temperature: float = 1.0, **ways: Any) -> list[Any]:
    engine = LocalEngine(model, slots=8, **ways)
    requests = [Request((3, 4, 5), Sampling(12, temperature), seed=seed) for seed in range(8)]
    return asyncio.run(engine.sample(requests))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
def test_ids_of_nothing_are_never_drawn_and_the_learner_agrees(folder: Path, way: str, temperature: float) -> None:
    model, tokenizer = Pretrained(str(folder))()
    segments = sampled(model, temperature, **WAYS[way])
    assert max(max(segment.tokens) for segment in segments) < len(tokenizer)
    if temperature == 1.0:
        tree = Tree.plant(Task("t", (3, 4, 5), "t"))
        for i, segment in enumerate(segments):
            tree.add(tree.root, list(segment.tokens), Author.POLICY, logprobs=segment.logprobs, finish="eos", reward=float(i % 2))
        mix = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
        (batch,) = pack([tree], mix.credit([tree]), mix)
        policy = TorchPolicy(model)
        found = policy.accumulate(mix, batch)
        mine = batch.author == int(Author.POLICY)
        assert (found.tempered[mine] - batch.behavior[mine]).abs().max() < 1e-4
        assert found.entropy[mine].max() <= torch.tensor(float(len(tokenizer))).log() + 1e-5
        if not model.config.tie_word_embeddings:
            grad = model.get_output_embeddings().weight.grad
            assert grad[: len(tokenizer)].abs().max() > 0
            assert grad[len(tokenizer) :].abs().max() == 0


def test_they_are_drawn_where_asked_for(folder: Path) -> None:
    model, tokenizer = Pretrained(str(folder), padded_tokens=True)()
    assert all(max(max(s.tokens) for s in sampled(model, **ways)) >= len(tokenizer) for ways in WAYS.values())


def test_adapters_and_copies_leave_them_out_too(folder: Path) -> None:
    model, tokenizer = Pretrained(str(folder))()
    assert max(max(s.tokens) for s in sampled(model, precision=torch.bfloat16)) < len(tokenizer)
    policy = TorchPolicy(model, lora=Lora(2), reference_model=True)
    assert policy.head.drawn == len(tokenizer)
    assert max(max(s.tokens) for s in sampled(policy.model)) < len(tokenizer)


def test_what_is_written_has_all_rows_and_no_mark(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = Pretrained(str(folder))()
    TorchPolicy(model, tokenizer).write(tmp_path)
    again, _ = Pretrained(str(tmp_path), padded_tokens=True)()
    assert again.get_output_embeddings().weight.shape[0] == 64
    assert "ramulus_tokens" not in (tmp_path / "config.json").read_text()
    assert not hasattr(again, "ramulus_tokens")


def test_a_model_without_padding_is_left_alone(tmp_path: Path) -> None:
    model, tokenizer = replace(START, max_positions=64)()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not hasattr(Pretrained(str(tmp_path))()[0], "ramulus_tokens")
