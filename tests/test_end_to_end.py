"""Sampler, tree and learner together: what the engine recorded is what the learner computes, on every path of every tree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from engines import KINDS, line, small
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.rng import uniform
from ramulus.engine.toy import Draw, draw_token
from ramulus.grow.fallback import Anyone, RandomCut
from ramulus.grow.growth import grow_forest, seed_of
from ramulus.grow.segments import Segments
from ramulus.grow.stop import Stop
from ramulus.grow.temperature import ByEntropy
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.torch_policy import TorchPolicy

EOS = 0
STOP = Stop((0, 1, 2), 24)
RULE = Segments(10, 5, 5, 1, first=3, seeds=Anyone(), fallback=RandomCut(window=3))  # cuts fall inside segments
MIX = Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
SAMPLINGS = {
    "plain": Sampling(99),
    "cold": Sampling(99, temperature=0.7),
    "by entropy": Sampling(99, temperature=ByEntropy(tau=0.3, limit=3, stats={"pivot": 0.0, "rms": 0.5})),
    "top-p": Sampling(99, temperature=0.7, top_p=0.8),
    "top-k": Sampling(99, temperature=1.3, top_k=5),
    "min-p": Sampling(99, temperature=0.7, min_p=0.05),
    "all three": Sampling(99, temperature=0.7, top_p=0.9, top_k=9, min_p=0.02),
}
Sampled = tuple[Request, Segment]


class Watched(LocalEngine):
    """A local engine that keeps every request with its answer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[Sampled] = []

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        segments = await super().sample(requests)
        self.seen += [(request, deepcopy(segment)) for request, segment in zip(requests, segments, strict=True)]
        return segments


def random_model(kind: str) -> Any:
    """Soft enough that paths differ, with an EOS now and then."""
    model = small(kind, eos_token_id=EOS)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    return model.eval()


def grown(model: nn.Module, sampling: Sampling, fast: bool = True) -> tuple[list[Tree], list[Sampled]]:
    """A few trees with rewards, sampled with less memory for KV than they would like."""
    engine = Watched(model, slots=6, memory=260_000, fast=fast)
    forest = [Tree.plant(Task(f"q{i}", line(4 + 3 * i, i), ""), seed=11) for i in range(4)]
    asyncio.run(grow_forest(forest, engine, RULE, sampling, STOP))
    assert engine.counters()["prefilled_again"] > 0, "some KV was dropped on the way"
    for tree in forest:
        for i, leaf in enumerate(tree.leaves()):
            leaf.reward = float(i % 2)
    return forest, engine.seen


@torch.no_grad()
def replayed(model: nn.Module, prefix: list[int], tokens: list[int], seed: int, sampling: Sampling) -> Iterator[Draw]:
    """What the model's plain forward over prefix + tokens gives for each token, drawn by the toy engine's plain Python."""
    logits = model(torch.tensor([prefix + tokens]), use_cache=False).logits[0, len(prefix) - 1 : -1].double()
    assert not callable(sampling.temperature)
    for i, row in enumerate(logits.tolist()):
        yield draw_token(row, sampling, sampling.temperature, uniform(seed, i))


def sampled_nodes(forest: list[Tree], seen: list[Sampled]) -> list[tuple[Tree, Node, Request, Segment]]:
    """Every request beside the node that holds its end now; later cuts may have moved its start into heads."""
    nodes = {seed_of(tree, node): (tree, node) for tree in forest for node in tree.walk() if node.parent is not None}
    return [(*nodes[request.seed], request, segment) for request, segment in seen]


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_is_what_the_learner_computes(kind: str, name: str) -> None:
    model = random_model(kind)
    forest, _ = grown(model, SAMPLINGS[name])
    assert {"branch", "fallback"} <= {node.why for tree in forest for node in tree.walk()}
    policy, count, cut = TorchPolicy(model), 0, 0
    for batch in pack(forest, MIX.credit(forest), MIX, tokens_per_batch=128):
        tempered, plain, entropy, _ = policy.evaluate(batch, grad=False)
        sampled = batch.author == int(Author.POLICY)
        assert bool((batch.weight[0][sampled] > 0).all()), "every sampled token is trained"
        assert float((tempered - batch.behavior)[sampled].abs().max()) < 1e-4
        assert float((entropy - batch.entropy)[sampled].abs().max()) < 1e-4
        count, cut = count + int(sampled.sum()), cut + int((batch.kept < 0).sum())
        if SAMPLINGS[name].temperature != 1:
            assert float((plain - batch.behavior)[sampled].abs().max()) > 0.01, "the temperature matters"
    assert count > 150
    assert (cut > 0) == (name not in ("plain", "cold", "by entropy"))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["plain", "all three"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_was_sampled_after_exactly_the_recorded_prefix(kind: str, name: str, fast: bool) -> None:
    """The seed's random numbers, put to the model's own distribution after the path that stands in the tree, give the tree's tokens."""
    model, sampling = random_model(kind), SAMPLINGS[name]
    forest, seen = grown(model, sampling, fast)
    after_cut = stale = 0
    for tree, node, request, segment in sampled_nodes(forest, seen):
        path = node.prefix()
        prefix, tokens = path[: len(path) - len(segment.tokens)], path[len(path) - len(segment.tokens) :]
        draws = list(replayed(model, prefix, tokens, request.seed, sampling))
        assert [d.token for d in draws] == tokens
        for ours, theirs in (("logprob", "logprobs"), ("kept", "kept"), ("entropy", "entropy")):
            told = getattr(segment, theirs)
            assert (told is None) == (theirs == "kept" and name == "plain")
            assert [getattr(d, ours) for d in draws] == pytest.approx([0.0] * len(tokens) if told is None else told.tolist(), abs=1e-4)
        if node.why == "fallback":
            after_cut += 1
            for other in tree.leaves():  # the defect of TreePO's released sampler: a sibling's longer text as the context
                wrong = other.prefix()[: len(prefix) + 2]
                if wrong[: len(prefix)] == prefix and len(wrong) == len(prefix) + 2:
                    again = list(replayed(model, wrong, tokens, request.seed, sampling))
                    stale += [d.token for d in again] != tokens
                    break
    assert after_cut >= 8
    assert stale >= after_cut // 2, "the check sees a stale context"
    heads = [n for t in forest for n in t.walk() if n.author is Author.POLICY and seed_of(t, n) not in {r.seed for r, _ in seen}]
    assert any(node.children and node.tokens for node in heads), "some segment was cut inside"


def test_a_recorded_column_that_is_off_would_be_noticed() -> None:
    model = random_model("qwen2")
    forest, _ = grown(model, SAMPLINGS["top-p"])
    node = next(n for t in forest for n in t.walk() if n.kept and min(n.kept) < -1e-3)
    node.kept = None
    policy = TorchPolicy(model)
    worst = 0.0
    for batch in pack(forest, MIX.credit(forest), MIX):
        tempered = policy.evaluate(batch, grad=False)[0]
        worst = max(worst, float((tempered - batch.behavior)[batch.author == int(Author.POLICY)].abs().max()))
    assert worst > 1e-4


