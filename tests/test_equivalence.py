"""The central test: packed trees give the gradients and values of their flattened trajectories under the textbook losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import textbook
from forests import Trajectory, flatten, forest
from ramify.core.tree import Author, Tree
from ramify.learn import gauges
from ramify.learn.advantage import Constant, GroupMean
from ramify.learn.batch import TreeBatch
from ramify.learn.estimator import Estimator
from ramify.learn.mask import Clip, DualClip, Everything
from ramify.learn.mix import ConstantLength, Mix, QuestionMean, SequenceMean, Term, TokenMean
from ramify.learn.pack import lay_out, pack
from ramify.learn.reference import Behavior, Itself, Recomputed
from ramify.learn.subgroup import SegmentValue, SubgroupMean

TOLERANCE = 1e-10
SEEDS = range(12)


@dataclass
class Rows:
    """Flattened trajectories of one kind as padded tensors [B, L], log-probs attached to the shared parameters."""

    logp: Tensor
    entropy: Tensor
    old: Tensor
    frozen: Tensor
    mask: Tensor
    reward: Tensor
    group: Tensor
    labels: list[tuple]
    rows: list[Trajectory]

    def only(self, keep: Tensor) -> Rows:
        """Some of the rows."""
        index = keep.nonzero()[:, 0].tolist()
        pick = {
            name: getattr(self, name)[keep] for name in ("logp", "entropy", "old", "frozen", "mask", "reward", "group")
        }
        return Rows(**pick, labels=[self.labels[i] for i in index], rows=[self.rows[i] for i in index])


Evaluate = Callable[[list[Trajectory]], tuple[list[Tensor], list[Tensor], list[Tensor]]]


def padded(values: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([v.double() for v in values], batch_first=True)


def rows_of(
    trees: list[Tree], evaluate: Evaluate, authors: tuple[Author, ...], tempered: bool, policy_only: bool
) -> Rows:
    """The graded trajectories of a forest, as a trainer without trees would hold them."""
    rows = [
        row
        for row in flatten(trees)
        if row.leaf.reward is not None and (not policy_only or row.leaf.author is Author.POLICY)
    ]
    hot, plain, entropy = evaluate(rows)
    return Rows(
        logp=padded(hot if tempered else plain),
        entropy=padded(entropy),
        old=padded([torch.tensor(row.behavior if tempered else row.recomputed, dtype=torch.float64) for row in rows]),
        frozen=padded([torch.tensor(row.frozen, dtype=torch.float64) for row in rows]),
        mask=padded([torch.tensor([float(a in authors) for a in row.authors]) for row in rows]),
        reward=torch.tensor([row.leaf.reward for row in rows], dtype=torch.float64),
        group=torch.tensor([row.tree for row in rows]),
        labels=[row.labels for row in rows],
        rows=rows,
    )


@dataclass
class Method:
    """A method in ramify's terms, and its textbook loss on rows."""

    mix: Mix
    loss: Callable[[list[Tree], Evaluate], Tensor]
    clips: bool = False


def term(mask, reference, advantage, normaliser=None, authors=(Author.POLICY,), coefficient=1.0) -> Term:
    return Term(Estimator(mask, reference, advantage), authors, normaliser or TokenMean(), coefficient)


def outcome(
    kind: str,
    how: str,
    token_loss: Callable[[Rows, Tensor], Tensor],
    tempered: bool = True,
    length: int = 0,
    by_fork: bool = False,
) -> Callable:
    """A textbook loss on outcome advantages of the policy's rows."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, (Author.POLICY,), tempered, policy_only=True)
        advantage = textbook.group_advantage(rows.reward, rows.group, kind)[:, None].expand_as(rows.logp)
        return close(rows, token_loss(rows, advantage), how, len(trees), length, by_fork)

    return loss


def close(rows: Rows, loss: Tensor, how: str, questions: int, length: int = 0, by_fork: bool = False) -> Tensor:
    """Aggregate over the rows that hold a learned token."""
    keep = rows.mask.sum(1) > 0
    kept = rows.only(keep)
    weight = fork_weights(kept) if by_fork else None
    return textbook.aggregate(loss[keep], kept.mask, how, kept.group, length, questions, weight)


def fork_weights(rows: Rows) -> Tensor:
    """Each row's share when every fork splits its weight equally among the branches that rows go down."""
    weights = []
    for row in rows.rows:
        mine = [other for other in rows.rows if other.tree == row.tree]
        weight = float(len(mine))
        for depth in range(1, len(row.forks)):
            weight /= len(
                {
                    tuple(other.forks[: depth + 1])
                    for other in mine
                    if other.forks[:depth] == row.forks[:depth] and len(other.forks) > depth
                }
            )
        weights.append(weight)
    return torch.tensor(weights, dtype=torch.float64)


def treepo(low: float, high: float, dual: float, weighting: str, root: bool, reject: bool) -> Callable:
    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, (Author.POLICY,), True, policy_only=True)
        raw = textbook.treepo_advantage(rows.reward, rows.group, rows.labels, rows.mask.sum(1), weighting, root, reject)
        advantage = textbook.whiten(raw[:, None].expand_as(rows.logp), rows.mask)
        return close(rows, textbook.ppo(rows.logp, rows.old, advantage, low, high, dual), "token_mean", len(trees))

    return loss


def segment_value(trees: list[Tree], evaluate: Evaluate) -> Tensor:
    """PPO on a value per token: the advantage is taken from the rule itself (the golden cases hold it), the folding is what is tested."""
    rows = rows_of(trees, evaluate, (Author.POLICY,), True, policy_only=True)
    credits = SegmentValue(2)(trees)
    advantage = torch.zeros_like(rows.logp)
    for i, row in enumerate(rows.rows):
        advantage[i, rows.mask[i] > 0] = torch.tensor(credits[row.tree].token[row.leaf.id], dtype=torch.float64)
    return close(rows, textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.28), "token_mean", len(trees))


def sft(trees: list[Tree], evaluate: Evaluate, how: str = "token_mean") -> Tensor:
    rows = rows_of(trees, evaluate, (Author.EXPERT,), True, policy_only=False)
    if not bool((rows.mask.sum() > 0).item()):
        return rows.logp.sum() * 0
    return close(rows, textbook.reinforce(rows.logp, torch.ones_like(rows.logp)), how, len(trees))


def grpo_loss(rows: Rows, advantage: Tensor) -> Tensor:
    return textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.2)


def dapo_loss(rows: Rows, advantage: Tensor) -> Tensor:
    return textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.28, 3.0)


def leashed_loss(rows: Rows, advantage: Tensor) -> Tensor:
    return grpo_loss(rows, advantage) + 0.05 * textbook.k3(rows.logp, rows.frozen) - 0.01 * rows.entropy


def reinforce_loss(rows: Rows, advantage: Tensor) -> Tensor:
    return textbook.reinforce(rows.logp, advantage)


RECOMPUTED = Clip(column="recomputed")
GRPO = term(Clip(), Behavior(), GroupMean(), SequenceMean())
SFT = term(Everything(), Itself(), Constant(), authors=(Author.EXPERT,))
EVERY_QUESTION = term(Everything(), Itself(), Constant(), QuestionMean(), (Author.EXPERT,), 0.3)
METHODS = {
    "sft": Method(Mix((SFT,)), sft),
    "grpo": Method(Mix((GRPO,)), outcome("grpo", "sequence_mean", grpo_loss), clips=True),
    "grpo_recomputed": Method(
        Mix((term(RECOMPUTED, Recomputed(), GroupMean(), SequenceMean()),)),
        outcome("grpo", "sequence_mean", grpo_loss, tempered=False),
        clips=True,
    ),
    "grpo_leash_bonus": Method(
        Mix((term(RECOMPUTED, Recomputed(), GroupMean(), TokenMean()),), leash=0.05, entropy_bonus=0.01),
        outcome("grpo", "token_mean", leashed_loss, tempered=False),
        clips=True,
    ),
    "dr_grpo": Method(
        Mix((term(Clip(), Behavior(), GroupMean(std=False), ConstantLength(7)),)),
        outcome("dr_grpo", "constant", grpo_loss, length=7),
        clips=True,
    ),
    "rloo": Method(
        Mix((term(Everything(), Itself(), GroupMean(std=False, leave_one_out=True), SequenceMean()),)),
        outcome("rloo", "sequence_mean", reinforce_loss),
    ),
    "dapo": Method(
        Mix((term(DualClip(0.2, 0.28, 3.0), Behavior(), GroupMean()),)),
        outcome("grpo", "token_mean", dapo_loss),
        clips=True,
    ),
    "grpo_each_fork": Method(
        Mix((GRPO,), share="each_fork"), outcome("grpo", "sequence_mean", grpo_loss, by_fork=True), clips=True
    ),
    "grpo_each_fork_tokens": Method(
        Mix((term(Clip(), Behavior(), GroupMean()),), share="each_fork"),
        outcome("grpo", "token_mean", grpo_loss, by_fork=True),
        clips=True,
    ),
    "treepo": Method(
        Mix((term(DualClip(0.2, 0.28, 10.0), Behavior(), SubgroupMean()),)),
        treepo(0.2, 0.28, 10.0, "average", True, False),
        clips=True,
    ),
    "treepo_size_rejecting": Method(
        Mix((term(DualClip(0.2, 0.28, 10.0), Behavior(), SubgroupMean("group_size", root=False, reject=True)),)),
        treepo(0.2, 0.28, 10.0, "group_size", False, True),
        clips=True,
    ),
    "treepo_segments": Method(Mix((term(Clip(0.2, 0.28), Behavior(), SegmentValue(2)),)), segment_value, clips=True),
    "rl_and_sft_per_question": Method(
        Mix((term(Clip(), Behavior(), GroupMean(std=False), QuestionMean()), EVERY_QUESTION)),
        lambda trees, evaluate: (
            outcome("dr_grpo", "question_mean", grpo_loss)(trees, evaluate)
            + 0.3 * sft(trees, evaluate, "question_mean")
        ),
        clips=True,
    ),
}


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
    """The ids of the leaves that some term trains."""
    keep: list[set[int]] = [set() for _ in trees]
    for part, credit in zip(mix.terms, credits, strict=True):
        for t, tree in enumerate(trees):
            values = credit[t].token if credit[t].token is not None else credit[t].leaf
            for leaf in tree.leaves():
                if values.get(leaf.id) is not None and any(n.author in part.authors and n.tokens for n in leaf.line()):
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
    batches = [spoil(batch) for batch in pack(trees, credits, mix, budget, dtype=torch.float64)]
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
        pack(trees, credits, mix, 0, torch.float64), free.packed(trees, mix, credits, 0), strict=True
    ):
        seen = batch.term(0)
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
