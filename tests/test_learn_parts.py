"""Advantages, normalisers, gauges and what is left out of learning, by hand; and what cannot be asked for."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, column
from ramulus.learn.advantage.baselines import SplitMean
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.advantage.subgroup import SegmentValue, SegmentZScore, SubgroupMean
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gauges import gauges, merge
from ramulus.learn.objective.mask import Clip, DualClip, Everything
from ramulus.learn.objective.mix import ConstantLength, Mix, QuestionMean, SequenceMean, Term, TokenMean
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed
from ramulus.learn.packing.pack import pack

PPO = Estimator(Clip(), Behavior(), GroupMean())


def path(tree: Tree, count: int, reward: float | None, logprob: float = -1.0, **changes: Any) -> Node:
    """A sampled path of `count` tokens from the root."""
    columns = {"logprobs": [logprob] * count, "kept": [0.0] * count, "entropy": [0.5] * count, "temperature": [1.0] * count}
    return tree.add(tree.root, [2] * count, Author.POLICY, finish="eos", reward=reward, **(columns | changes))


def star(*rewards: float | None, count: int = 2) -> Tree:
    tree = Tree.plant(Task("q", (1, 1), ""))
    for reward in rewards:
        path(tree, count, reward)
    return tree


def row(trees: list[Tree], mix: Mix) -> TreeBatch:
    (batch,) = pack(trees, mix.credit(trees), mix, dtype=torch.float64)
    return batch


def test_group_means_by_hand() -> None:
    def credit(rule: GroupMean, *rewards: float | None) -> list[float | None]:
        return list(rule([star(*rewards)])[0].leaf.values())

    assert credit(GroupMean(std=False), 1.0, 0.0, 0.0, None) == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert credit(GroupMean(std=False, leave_one_out=True), 1.0, 0.0, 0.0) == pytest.approx([1.0, -0.5, -0.5])
    deviation = math.sqrt(1 / 3)
    assert credit(GroupMean(), 1.0, 0.0, 0.0) == pytest.approx([2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation], rel=1e-5)


LONE = [GroupMean(), GroupMean(std=False, leave_one_out=True), SplitMean(), TokenGroupMean(), SubgroupMean(whiten=False), SegmentZScore(1),
GlobalLocal("released", unbranched=True)]


@pytest.mark.parametrize("rule", LONE)
def test_a_lone_graded_leaf_earns_what_the_setting_says(rule: Any) -> None:
    tree = star(-0.5, None)
    for lone, want in (("zero", 0.0), ("reward", -0.5)):
        (credit,) = replace(rule, lone=lone)([tree])
        (leaf,) = credit.trained()
        got = credit.token[leaf][0] if credit.token else credit.node[leaf] if credit.node else credit.leaf[leaf]
        assert got == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="lone is 'zero' or 'reward', got 'none'"):
        replace(rule, lone="none")
    assert rule.lone == "zero"


def test_a_lone_path_beside_a_demonstration_is_no_group_of_its_own() -> None:
    tree = star(0.25)
    shown = tree.add(tree.root, [3], Author.EXPERT, finish="eos", reward=1.0)
    assert list(GroupMean(std=False, over="all")([tree])[0].leaf.values()) == [-0.375, 0.375]
    assert SplitMean(std=False)([tree])[0].leaf == {1: 0.0, shown.id: 0.75}
    assert SplitMean(std=False, lone="reward")([tree])[0].leaf == {1: 0.25, shown.id: 1.0}


def test_the_baseline_may_run_over_demonstrations() -> None:
    tree = star(1.0, 0.0)
    expert = tree.add(tree.root, [3], Author.EXPERT, finish="eos", reward=1.0)
    assert expert.id not in GroupMean(std=False)([tree])[0].leaf
    everyone = GroupMean(std=False, over="all")([tree])[0].leaf
    assert list(everyone.values()) == pytest.approx([1 / 3, -2 / 3, 1 / 3])


@pytest.mark.parametrize("rule", [GroupMean(), GroupMean(std=False, leave_one_out=True), SubgroupMean(), SubgroupMean("group_size")])
def test_rounding_leaves_no_credit_where_all_rewards_are_equal(rule: Any) -> None:
    for reward in (0.1, 0.7, -0.97, 1 / 3):
        for count in range(2, 24):
            assert set(rule([star(*[reward] * count)])[0].leaf.values()) == {0.0}


@pytest.mark.parametrize(
    ("normaliser", "weights"),
    [
        (TokenMean(), [1 / 9, 1 / 9, 1 / 9]),
        (SequenceMean(), [1 / 6, 1 / 12, 1 / 9]),
        (ConstantLength(10), [1 / 30, 1 / 30, 1 / 30]),
        (QuestionMean(), [1 / 8, 1 / 16, 1 / 6]),
    ],
)
def test_normalisers_by_hand(normaliser: Any, weights: list[float]) -> None:
    """Paths of 2 and 4 tokens on one question, one of 3 on another; denominators are those of both."""
    first, second = Tree.plant(Task("a", (1,), "")), Tree.plant(Task("b", (1,), ""))
    path(first, 2, 1.0), path(first, 4, 0.0), path(second, 3, 1.0)
    mix = Mix((Term(PPO, normaliser=normaliser),))
    whole = row([first, second], mix)
    assert whole.leaf_weight[0].tolist() == pytest.approx(weights)
    split = pack([first, second], mix.credit([first, second]), mix, 6, torch.float64)
    assert len(split) > 1
    assert sorted(w for b in split for w in b.leaf_weight[0].tolist()) == pytest.approx(sorted(weights))


def test_a_filtered_path_is_in_no_mean_gradient_denominator_leash_or_bonus() -> None:
    """What a forest is worth must not depend on over-long answers that were filtered out."""
    mix = Mix((Term(PPO),), kl_coef=0.1, entropy_bonus=0.1)
    with_it, without = star(1.0, None, 0.0, 1.0), star(1.0, 0.0, 1.0)
    with_it.leaves()[1].finish = "length"
    for tree in (with_it, without):
        for node in tree.walk():
            node.signals["reference_model"] = column([-1.2] * len(node.tokens), "d")
    ours, theirs = row([with_it], mix), row([without], mix)
    for name in (f.name for f in fields(TreeBatch)):
        value = getattr(ours, name)
        assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(theirs, name)), name


def test_gauges_by_hand() -> None:
    """Three paths: up by 0.5 with positive credit, down by 0.5 with negative credit, and a sure token that stays."""
    tree = Tree.plant(Task("q", (1, 1), ""))
    path(tree, 1, 1.0), path(tree, 1, 0.0), path(tree, 1, 1.0, logprob=0.0, entropy=[1e-9])
    mix = Mix((Term(Estimator(Clip(0.2, 0.2), Behavior(), GroupMean(std=False))),))
    batch = row([tree], mix)
    logp = torch.tensor([0.0, 0.0, -0.5, -1.5, 0.0], dtype=torch.float64)
    entropy = torch.tensor([9.0, 9.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    found = merge([gauges(mix, logp, logp, entropy, batch)])
    k3 = [math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5, 0.0]
    assert found["clip_high"] == pytest.approx(0.5), "of the positive credit half lies on the token that went up"
    assert found["clip_low"] == pytest.approx(1.0)
    assert found["entropy"] == pytest.approx(0.2), "prompts are left out"
    assert found["kl_sampler"] == pytest.approx(sum(k3) / 3), "the sure token counts"
    assert (found["ratio_max"], found["ratio_min"]) == pytest.approx((math.exp(0.5), math.exp(-0.5)))
    assert found["mismatch_max"] == pytest.approx(0.5)
    assert found["mismatch"] == pytest.approx(1 / 3)
    assert found["mismatch_share"] == pytest.approx(2 / 3), "the sure token is not far"
    assert found["mismatch_kl"] == pytest.approx(sum(k3) / 3)
    other = merge([gauges(mix, logp, logp, entropy, batch, version=1)])
    assert other["kl_sampler"] > 0 == other["mismatch"] == other["mismatch_kl"] == other["mismatch_max"], "another version sampled them"


def test_greedy_tokens_are_not_compared_with_the_sampler() -> None:
    tree = Tree.plant(Task("q", (1, 1), ""))
    path(tree, 2, 1.0), path(tree, 2, 0.0, logprob=0.0, temperature=[0.0] * 2)
    mix = Mix((Term(Estimator(Clip(column="recomputed"), Recomputed(), GroupMean())),))
    for leaf in tree.leaves():
        leaf.signals["recomputed"] = column([-1.0] * 2, "d")
    batch = row([tree], mix)
    logp = torch.full((6,), -1.0, dtype=torch.float64)
    assert merge([gauges(mix, logp, logp, logp.exp(), batch)])["mismatch_max"] == 0.0


def test_dual_clip_gives_the_gradient_of_its_textbook_loss() -> None:
    """Ratios on both sides of every edge, both signs of the advantage."""
    old = torch.full((7,), -2.0, dtype=torch.float64)
    logp = (old + torch.tensor([0.1, 0.7, 0.9, 1.2, 2.0, 4.0, 1.5], dtype=torch.float64).log()).requires_grad_()
    tree = star(1.0)
    path(tree, 5, 1.0)
    batch = row([tree], Mix((Term(PPO),)))
    batch.behavior = torch.cat([old, old])[: len(batch)]
    logp = torch.cat([logp, logp])[: len(batch)].detach().requires_grad_()
    for sign in (1, -1):
        ratio, rule = (logp - batch.behavior).exp(), DualClip(0.2, 0.28, 3.0)
        loss = torch.maximum(-sign * ratio, -sign * ratio.clamp(0.8, 1.28))
        loss = loss if sign > 0 else torch.minimum(loss, torch.full_like(loss, 3.0))
        (want,) = torch.autograd.grad(loss.sum(), logp)
        ours = -sign * ratio * rule(sign, logp.detach(), logp.detach(), batch)
        torch.testing.assert_close(ours.detach(), want)
        assert bool((want == 0).any())
        assert bool((want != 0).any())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Clip(low=1.0), "low=1.0"),
        (lambda: Clip(column="reference_model"), "'reference_model'"),
        (lambda: DualClip(ceiling=1.0), "above 1, got 1.0"),
        (lambda: GroupMean(over="expert"), "'expert'"),  # type: ignore[arg-type]
        (lambda: SubgroupMean("sum"), "'sum'"),  # type: ignore[arg-type]
        (lambda: SubgroupMean(depth=0), "got 0"),
        (lambda: SegmentValue(0), "got 0"),
        (lambda: SegmentZScore(0), "got 0"),
        (lambda: ConstantLength(0), "got 0"),
        (lambda: Term(PPO, authors=(Author.TOOL,)), "TOOL"),
        (lambda: Term(PPO, authors=()), r"got \(\)"),
        (lambda: Mix(()), "at least one term"),
        (lambda: Mix((Term(PPO),), share="each_tree"), "'each_tree'"),  # type: ignore[arg-type]
        (lambda: Estimator(Clip(), Recomputed(), GroupMean()), "tempered or untempered as a whole"),
        (lambda: Estimator(Clip(column="recomputed"), Behavior(), GroupMean()), "tempered or untempered as a whole"),
    ],
)
def test_what_cannot_be_asked_for(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_term_is_tempered_or_not_as_a_whole() -> None:
    assert PPO.tempered
    assert Estimator(Everything(), Itself(), Constant()).tempered
    assert not Estimator(Everything(), Recomputed(), GroupMean()).tempered
    assert not Estimator(Clip(column="recomputed"), Itself(), GroupMean()).tempered


def test_columns_that_were_not_filled_are_named() -> None:
    tree = star(1.0, 0.0)
    with pytest.raises(ValueError, match="has no 'reference_model' log-probs: have the forest scored"):
        row([tree], Mix((Term(PPO),), kl_coef=0.1))
    with pytest.raises(ValueError, match="has no 'recomputed' log-probs"):
        row([tree], Mix((Term(Estimator(Everything(), Recomputed(), GroupMean())),)))


def test_tokens_that_were_not_sampled_have_no_ratio_to_the_sampler() -> None:
    demonstrated = star(1.0, 0.0)
    demonstrated.add(demonstrated.root, [3, 4], Author.EXPERT, finish="eos", reward=1.0)
    from_disk = star(1.0, 0.0)
    for leaf in from_disk.leaves():
        leaf.logprobs, leaf.kept, leaf.entropy, leaf.temperature = column([]), None, None, 1.0
    learn_from_both = Mix((Term(Estimator(Clip(), Behavior(), Constant()), authors=(Author.POLICY, Author.EXPERT)),))
    with pytest.raises(ValueError, match=r"written by EXPERT, has no log-probs of a sampler.*use Itself\(\)"):
        row([demonstrated], learn_from_both)
    with pytest.raises(ValueError, match="written by POLICY, has no log-probs"):
        row([from_disk], Mix((Term(PPO),)))
    assert row([demonstrated], Mix((Term(PPO),))).gain.any(), "it does no harm where nothing is learned from it"


def test_a_path_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="a path of 12 tokens does not fit in tokens_per_batch=11"):
        pack([star(1.0, 0.0, count=10)], Mix((Term(PPO),)).credit([star(1.0, 0.0, count=10)]), Mix((Term(PPO),)), 11)
