"""The central test through a real transformers model: gradients of its parameters, packed against one trajectory at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from forests import Trajectory, flatten, forest
from methods import METHODS
from ramulus.core.tree import Author, Tree
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective import gauges
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.torch_policy import TorchPolicy
from test_equivalence import TOLERANCE, apart, budget_for, gradients
from tiny import FAMILIES, build


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param, double=True)


def one_by_one(model: nn.Module, warm: bool = False) -> Callable[[list[Trajectory]], tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Log-probs and entropy of each trajectory by a forward pass of its own; `warm`: the entropy at the temperature of sampling."""

    def evaluate(rows: list[Trajectory]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        hot, plain, entropy = [], [], []
        for row in rows:
            tokens = torch.tensor(row.tokens, dtype=torch.long)
            logits = model(input_ids=torch.tensor([row.prompt + row.tokens]), use_cache=False).logits[
                0, len(row.prompt) - 1 : -1
            ]
            logp = logits.log_softmax(-1)
            heat = torch.tensor(row.temperature, dtype=torch.float64)[:, None]
            plain.append(logp.gather(1, tokens[:, None])[:, 0])
            tempered = (logits / heat).log_softmax(-1)
            hot.append(tempered.gather(1, tokens[:, None])[:, 0])
            logp = tempered if warm else logp
            entropy.append(-(logp.exp() * logp).sum(-1))
        return hot, plain, entropy

    return evaluate


def record(model: nn.Module, trees: list[Tree], seed: int) -> None:
    """Write log-probs near the model's own into the trees, as an older policy would have left them."""
    rng = random.Random(seed)
    nodes = [{node.id: node for node in tree.walk()} for tree in trees]
    with torch.no_grad():
        rows = flatten(trees)
        hot, plain, _ = one_by_one(model)(rows)
    done = set()
    for row, h, p in zip(rows, hot, plain, strict=True):
        for spot, a, b in zip(row.spots, h.tolist(), p.tolist(), strict=True):
            if spot in done:
                continue
            done.add(spot)
            node, k = nodes[spot[0]][spot[1]], spot[2]
            if node.logprobs:
                node.logprobs[k] = a + rng.gauss(0, 0.4) - node.kept[k]
            node.signals["recomputed"][k] = b + rng.gauss(0, 0.4)
            node.signals["reference_model"][k] = b + rng.gauss(0, 0.4)
            for name in ("recomputed_tempered", "reference_model_tempered"):
                node.signals[name][k] = a + rng.gauss(0, 0.4)


def through(
    model: nn.Module, trees: list[Tree], name: str, budget: int, spoil: Callable[[TreeBatch], TreeBatch] = lambda b: b
) -> tuple[list[Tensor], float]:
    """Parameter gradients and textbook value by way of the packed rows."""
    mix = METHODS[name].mix
    policy = TorchPolicy(model)
    total, value = torch.zeros((), dtype=torch.float64), 0.0
    seen = []
    for batch in pack(trees, mix.credit(trees), mix, budget, dtype=torch.float64, gates=mix.gates(trees, {})[0]):
        hot, plain, entropy, _ = policy.evaluate(spoil(batch), entropy_grad=bool(mix.entropy_bonus), hot=mix.entropy_tempered)
        total = total + mix.loss(hot, plain, entropy, batch)
        value += gauges.surrogate(mix, hot, plain, entropy, batch)
        seen.append(gauges.gauges(mix, hot, plain, entropy, batch))
    if METHODS[name].clips:
        rates = gauges.merge(seen)
        assert max(rates["clip_high"], rates["clip_low"]) >= 0.05
    return gradients(total, list(model.parameters())), value


@pytest.mark.parametrize("size", ["one row", "cut"])
@pytest.mark.parametrize("name", METHODS)
def test_through_a_model(model: nn.Module, name: str, size: str) -> None:
    trees = forest(5, tempered=True)
    record(model, trees, 5)
    want = METHODS[name].loss(trees, one_by_one(model, METHODS[name].mix.entropy_tempered))
    ours, value = through(model, trees, name, budget_for(trees, size))
    assert any(row.leaf.author is Author.EXPERT for row in flatten(trees))
    assert apart(ours, gradients(want, list(model.parameters()))) < TOLERANCE
    assert value == pytest.approx(float(want.detach()), abs=TOLERANCE)
    assert max(float(g.abs().max()) for g in ours) > 1e-4


def causal(batch: TreeBatch) -> TreeBatch:
    return replace(batch, end=torch.full_like(batch.end, len(batch)))


def packed_positions(batch: TreeBatch) -> TreeBatch:
    return replace(batch, position=torch.arange(len(batch)))


def shifted_parents(batch: TreeBatch) -> TreeBatch:
    return replace(batch, parent=(torch.arange(len(batch)) - 1).clamp(min=0))


@pytest.mark.parametrize("spoil", [causal, packed_positions, shifted_parents])
def test_through_a_model_can_fail(spoil: Callable[[TreeBatch], TreeBatch]) -> None:
    model = build("qwen2", double=True)
    trees = forest(5, tempered=True)
    record(model, trees, 5)
    want = gradients(METHODS["grpo"].loss(trees, one_by_one(model)), list(model.parameters()))
    ours, _ = through(model, trees, "grpo", 0, spoil)
    assert apart(ours, want) > 1e-5
