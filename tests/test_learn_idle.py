"""Leaves without credit are left out of the rows: gradients, denominators and gauges stay what they were."""

from __future__ import annotations

import pytest
import torch

from forests import forest
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gauges import gauges, merge
from ramulus.learn.objective.mask import Clip, Everything
from ramulus.learn.objective.mix import Mix, SequenceMean, Term
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.packing.pack import pack
from ramulus.learn.packing.weights import idle_entropy, select
from ramulus.learn.policy.torch_policy import TorchPolicy
from test_learn_parts import star
from tiny import build

PPO = Estimator(Clip(), Behavior(), GroupMean(std=False))


class ByNode:
    """Credit on some nodes alone."""

    def __call__(self, trees: list[Tree]) -> list[Credits]:
        return [
            Credits(
                {leaf.id: 0.0 for leaf in tree.leaves()}, {node.id: 1.0 for node in tree.walk() if node.id % 5 == 1}
            )
            for tree in trees
        ]


class ByToken:
    """Credit on the tokens of every third leaf."""

    def __call__(self, trees: list[Tree]) -> list[Credits]:
        def of(tree: Tree) -> dict[int, list[float] | None]:
            count = {
                leaf.id: sum(len(n.tokens) for n in leaf.line() if n.author is Author.POLICY) for leaf in tree.leaves()
            }
            return {leaf: [float(leaf % 3 == 0)] * n for leaf, n in count.items() if n}

        return [Credits(token=of(tree)) for tree in trees]


MIXES = {
    "leaf": Mix((Term(PPO),)),
    "sequence mean": Mix((Term(PPO, normaliser=SequenceMean()),)),
    "node": Mix((Term(Estimator(Everything(), Itself(), ByNode())),)),
    "token": Mix((Term(Estimator(Everything(), Itself(), ByToken())),)),
    "two terms": Mix((Term(PPO), Term(Estimator(Everything(), Itself(), Constant(1.0)), authors=(Author.EXPERT,)))),
}


def levelled(seed: int) -> list[Tree]:
    """Random trees, of which some have nothing to learn from."""
    trees = forest(seed, trees=4)
    for tree in trees[1:3]:
        for leaf in tree.leaves():
            leaf.reward = None if leaf.reward is None else 1.0
    return trees


@pytest.mark.parametrize("budget", [0, 40])
@pytest.mark.parametrize("name", MIXES)
def test_gradients_stay_the_same(name: str, budget: int) -> None:
    mix, dropped = MIXES[name], 0
    for seed in range(4):
        trees = levelled(seed)
        found = []
        for drop in (False, True):
            policy = TorchPolicy(build(double=True))
            rows = pack(trees, mix.credit(trees), mix, budget, torch.float64, drop_idle=drop)
            for row in rows:
                policy.accumulate(mix, row)
            zeros = {n: torch.zeros_like(p) for n, p in policy.trainable.items()}
            found.append({n: zeros[n] if p.grad is None else p.grad for n, p in policy.trainable.items()})
            dropped += sum(len(row) for row in rows) * (1 if drop else -1)
        assert max(float(g.abs().max()) for g in found[0].values()) > 1e-4
        for n, gradient in found[0].items():
            torch.testing.assert_close(found[1][n], gradient, rtol=0, atol=1e-12)
    assert dropped < 0, "something was left out"


def test_nothing_is_left_out_under_a_leash_or_a_bonus() -> None:
    trees = levelled(0)
    for mix in (Mix((Term(PPO),), kl_coef=0.1), Mix((Term(PPO),), entropy_bonus=0.1)):
        credits = mix.credit(trees)
        sizes = [[len(row) for row in pack(trees, credits, mix, drop_idle=drop)] for drop in (False, True)]
        assert sizes[0] == sizes[1]


def test_a_step_without_credit_has_no_rows() -> None:
    mix = Mix((Term(PPO),))
    trees = [star(1.0, 1.0), star(0.0, 0.0)]
    assert pack(trees, mix.credit(trees), mix, drop_idle=True) == []


def test_gauges_say_the_same_where_the_sampler_was_right() -> None:
    """Entropy of the left-out paths is that of the sampler, once each; clip fractions are shares of credit and need no other path."""
    mix = Mix((Term(PPO),))
    trees = [star(1.0, 0.0), star(1.0, 1.0, count=5), star(0.0, 1.0, 0.0, count=3)]
    found = []
    for drop in (False, True):
        rows = pack(trees, mix.credit(trees), mix, 12, torch.float64, drop_idle=drop)
        assert len(rows) > 1
        told = [gauges(mix, row.behavior + 0.3, row.behavior + 0.3, row.entropy, row) for row in rows]
        chosen = select(trees, mix.credit(trees), mix, drop_idle=drop)
        assert (idle_entropy(trees, chosen, mix) != {}) == drop
        found.append(merge([*told, idle_entropy(trees, chosen, mix)]))
    assert found[0] == pytest.approx(found[1])
    assert found[1]["entropy"] == pytest.approx(0.5)
    assert found[1]["clip_high"] == 1.0
