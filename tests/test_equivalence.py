"""The central test: packed trees give the gradients and values of their flattened trajectories under the textbook losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from forests import Trajectory, flatten, forest
from methods import METHODS
from ramulus.core.tree import Tree
from ramulus.learn.batch.layout import lay_out
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective import gauges
from ramulus.learn.objective.gate import weigh
from ramulus.learn.objective.mix import Mix
from ramulus.learn.packing.pack import pack

TOLERANCE = 1e-10
SEEDS = range(12)


class Free:
    """Level 1: every token's log-probs and entropy are free parameters, shared by the trajectories that share the token."""

    def __init__(self, trees: list[Tree], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.index = {
            (t, node.id, k): None
            for t, tree in enumerate(trees)
            for node in tree.walk()
            for k in range(len(node.tokens))
        }
        self.index = {spot: i for i, spot in enumerate(self.index)}
        near = torch.zeros(2, len(self.index), dtype=torch.float64)
        for row in flatten(trees):
            for spot, b, r in zip(row.spots, row.behavior, row.recomputed, strict=True):
                near[:, self.index[spot]] = torch.tensor([b, r], dtype=torch.float64)
        noise = torch.randn(near.shape, generator=generator, dtype=torch.float64)
        logp = near + 0.5 * noise
        entropy = torch.rand(len(self.index), generator=generator, dtype=torch.float64)
        self.hot, self.plain, self.entropy = (x.clone().requires_grad_() for x in (logp[0], logp[1], entropy))

    @property
    def parameters(self) -> list[Tensor]:
        return [self.hot, self.plain, self.entropy]

    def rows(self, rows: list[Trajectory]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        picks = [torch.tensor([self.index[spot] for spot in row.spots], dtype=torch.long) for row in rows]
        return [self.hot[p] for p in picks], [self.plain[p] for p in picks], [self.entropy[p] for p in picks]

    def packed(self, trees: list[Tree], mix: Mix, credits: list, budget: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        keep = kept_leaves(trees, mix, credits)
        answer = []
        for row in lay_out(trees, keep, budget):
            picks = torch.tensor(
                [self.index[t, node.id, k] for t, node, a, b in row.nodes for k in range(b - a)], dtype=torch.long
            )
            answer.append((self.hot[picks], self.plain[picks], self.entropy[picks]))
        return answer


def kept_leaves(trees: list[Tree], mix: Mix, credits: list) -> list[set[int]]:
    """The ids of the leaves that some term trains, where a gate does not close them."""
    gates = mix.gates(trees, {})[0] or [None] * len(trees)
    keep: list[set[int]] = [set() for _ in trees]
    for part, credit in zip(mix.terms, credits, strict=True):
        for t, tree in enumerate(trees):
            values = credit[t].token if credit[t].token is not None else credit[t].leaf
            for leaf in tree.leaves():
                open_ = gates[t] is None or weigh(leaf, part.side, gates[t])
                if (
                    open_
                    and values.get(leaf.id) is not None
                    and any(n.author in part.authors and n.tokens for n in leaf.line())
                ):
                    keep[t].add(leaf.id)
    return keep


def gradients(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(parameters)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def packed_result(
    trees: list[Tree], mix: Mix, free: Free, budget: int, spoil: Callable[[TreeBatch], TreeBatch] = lambda b: b
) -> tuple[list[Tensor], float]:
    """Gradients and textbook value by way of the packed rows."""
    credits = mix.credit(trees)
    gates, _ = mix.gates(trees, {})
    batches = [spoil(batch) for batch in pack(trees, credits, mix, budget, dtype=torch.float64, gates=gates)]
    total, value = torch.zeros((), dtype=torch.float64), 0.0
    for batch, (hot, plain, entropy) in zip(batches, free.packed(trees, mix, credits, budget), strict=True):
        total = total + mix.loss(hot, plain, entropy, batch)
        value += gauges.surrogate(mix, hot, plain, entropy, batch)
    return gradients(total, free.parameters), value


def budget_for(trees: list[Tree], size: str) -> int:
    """0: no limit; small: barely more than the longest path, so that trees are cut; shared: several trees on a row."""
    longest = max(len(leaf.prefix()) for tree in trees for leaf in tree.leaves())
    return {"one row": 0, "cut": longest + 1, "shared": 3 * longest}[size]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True) if a.numel())


@pytest.mark.parametrize("size", ["one row", "cut", "shared"])
@pytest.mark.parametrize("name", METHODS)
def test_free_log_probs(name: str, size: str) -> None:
    method = METHODS[name]
    clipped = weighed = moved = 0.0
    for seed in SEEDS:
        trees = forest(seed, tempered=True)
        free = Free(trees, seed)
        want = method.loss(trees, free.rows)
        ours, value = packed_result(trees, method.mix, free, budget_for(trees, size))
        assert apart(ours, gradients(want, free.parameters)) < TOLERANCE
        assert value == pytest.approx(float(want.detach()), abs=TOLERANCE)
        moved = max(moved, max(float(g.abs().max()) for g in ours))
        cut, total = clipped_tokens(trees, method.mix, free)
        clipped, weighed = clipped + cut, weighed + total
    assert moved > 1e-3
    if method.clips:
        assert clipped / weighed >= 0.05


def clipped_tokens(trees: list[Tree], mix: Mix, free: Free) -> tuple[float, float]:
    """Flattened tokens of the first term whose gradient the mask takes, and all with credit."""
    credits = mix.credit(trees)
    part = mix.terms[0]
    cut = total = 0.0
    for batch, (hot, plain, entropy) in zip(
        pack(trees, credits, mix, 0, torch.float64, gates=mix.gates(trees, {})[0]),
        free.packed(trees, mix, credits, 0),
        strict=True,
    ):
        seen = mix.term(batch, 0)
        logp = (hot if part.estimator.tempered else plain).detach()
        for sign, credit in ((1, seen.gain), (-1, seen.pain)):
            cut += float(((part.estimator.mask(sign, logp, entropy, seen) == 0) & (credit != 0)).sum())
            total += float((credit != 0).sum())
    return cut, total


def one_advantage(batch: TreeBatch) -> TreeBatch:
    both = batch.gain + batch.pain
    return replace(batch, gain=both.clamp(min=0), pain=both.clamp(max=0))


def unique_counts(batch: TreeBatch) -> TreeBatch:
    return replace(batch, gain=batch.gain / batch.leaves.clamp(min=1), pain=batch.pain / batch.leaves.clamp(min=1))


def missing_branch_target(batch: TreeBatch) -> TreeBatch:
    """Only the first child of each branch point is a target."""
    first = torch.ones(len(batch), dtype=torch.bool)
    seen: set[int] = set()
    for t, parent in enumerate(batch.parent.tolist()):
        first[t] = parent == t or parent not in seen
        seen.add(parent)
    return replace(batch, gain=batch.gain * first, pain=batch.pain * first)


@pytest.mark.parametrize("spoil", [one_advantage, unique_counts, missing_branch_target])
def test_free_log_probs_can_fail(spoil: Callable[[TreeBatch], TreeBatch]) -> None:
    method = METHODS["grpo"]
    worst = 0.0
    for seed in SEEDS:
        trees = forest(seed, tempered=True)
        free = Free(trees, seed)
        ours, _ = packed_result(trees, method.mix, free, 0, spoil)
        worst = max(worst, apart(ours, gradients(method.loss(trees, free.rows), free.parameters)))
    assert worst > 1e-3


def test_minibatches_keep_the_credit_of_the_whole_forest() -> None:
    """Credit is given over the forest, denominators over the optimizer step's trees."""
    trees = forest(3, trees=4, tempered=True)
    mix = METHODS["treepo"].mix
    credits = mix.credit(trees)
    half = pack(trees[:2], [c[:2] for c in credits], mix, 0, torch.float64)
    whole = mix.credit(trees[:2])
    assert any(abs(credits[0][0].leaf[k] - whole[0][0].leaf[k]) > 1e-6 for k in credits[0][0].leaf)
    assert sum(float(b.weight[0].sum()) for b in half) == pytest.approx(1.0)
