"""Every shipped method twice: in ramulus's terms, and as its textbook loss on flattened rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import textbook
import textbook_trees
from forests import Trajectory, flatten
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.advantage.subgroup import SegmentValue, SegmentZScore, SubgroupMean
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip, DualClip, Everything
from ramulus.learn.objective.mix import ConstantLength, Mix, QuestionMean, SequenceMean, Term, TokenMean
from ramulus.learn.objective.reference import Behavior, Itself, Recomputed


@dataclass
class Rows:
    """Flattened trajectories of one kind as padded tensors [B, L], log-probs attached to the shared parameters."""

    logp: Tensor
    entropy: Tensor
    old: Tensor
    reference: Tensor
    mask: Tensor
    reward: Tensor
    group: Tensor
    labels: list[tuple]
    rows: list[Trajectory]

    def only(self, keep: Tensor) -> Rows:
        """Some of the rows."""
        index = keep.nonzero()[:, 0].tolist()
        pick = {
            name: getattr(self, name)[keep] for name in ("logp", "entropy", "old", "reference", "mask", "reward", "group")
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
        reference=padded([torch.tensor(row.reference, dtype=torch.float64) for row in rows]),
        mask=padded([torch.tensor([float(a in authors) for a in row.authors]) for row in rows]),
        reward=torch.tensor([row.leaf.reward for row in rows], dtype=torch.float64),
        group=torch.tensor([row.tree for row in rows]),
        labels=[row.labels for row in rows],
        rows=rows,
    )


@dataclass
class Method:
    """A method in ramulus's terms, and its textbook loss on rows."""

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


def per_token(advantage: Callable[[Rows], Tensor]) -> Callable:
    """PPO on an advantage [B, L] that differs from token to token."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, (Author.POLICY,), True, policy_only=True)
        return close(rows, textbook.ppo(rows.logp, rows.old, advantage(rows), 0.2, 0.28), "token_mean", len(trees))

    return loss


def on_learned(rows: Rows, values: list[Tensor]) -> Tensor:
    """Values of each row's learned tokens, set where the mask is 1."""
    answer = torch.zeros_like(rows.logp)
    for i, value in enumerate(values):
        answer[i, rows.mask[i] > 0] = value
    return answer


def segment_value(rows: Rows) -> Tensor:
    lengths = rows.mask.sum(1).long().tolist()
    raw = on_learned(rows, textbook.segment_advantage(rows.reward, rows.group, rows.labels, lengths, 2, 0.7))
    return textbook.whiten(raw, rows.mask)


def segment_zscore(rows: Rows) -> Tensor:
    lengths = rows.mask.sum(1).long().tolist()
    return on_learned(rows, textbook.spo_advantage(rows.reward, rows.group, rows.labels, lengths, 2))


@dataclass(frozen=True)
class NodeValue:
    """A value per node: the mean reward below it minus that of the tree; over-long leaves are not trained."""

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        return [self.credit(tree) for tree in forest]

    def credit(self, tree: Tree) -> Credits:
        values = {node.id: tree.value(node) for node in tree.walk()}
        whole = values[0] or 0.0
        trained = {leaf.id: leaf.reward for leaf in tree.leaves() if leaf.finish != "length"}
        return Credits(trained, node={node: value - whole for node, value in values.items() if value is not None})


def node_value(trees: list[Tree], evaluate: Evaluate) -> Tensor:
    """Each token's advantage is the mean reward of the rows that share it minus its question's; rows that ended by length are dropped."""
    rows = rows_of(trees, evaluate, (Author.POLICY,), True, policy_only=False)
    advantage = torch.zeros_like(rows.logp)
    for i, row in enumerate(rows.rows):
        for t, spot in enumerate(row.spots):
            sharing = torch.tensor([spot in other.spots for other in rows.rows])
            advantage[i, t] = rows.reward[sharing].mean() - rows.reward[rows.group == rows.group[i]].mean()
    loss = textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.28)
    ended = torch.tensor([row.leaf.finish != "length" for row in rows.rows])
    return close(rows.only(ended), loss[ended], "token_mean", len(trees))


def on_nodes(
    form: str, unbranched: bool, how: str, tempered: bool, token_loss: Callable[[Rows, Tensor], Tensor], most: int = 0
) -> Callable:
    """A textbook loss on advantages of nodes, over the rows that something branches from."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, (Author.POLICY,), tempered, policy_only=True)
        trained = [unbranched or len(policy_part(row)) > 2 for row in rows.rows]
        if most:
            seeds = [f"{tree.seed}/{tree.task.id}/{tree.visit}/trained" for tree in trees]
            trained = textbook_trees.some(rows.reward, rows.group, trained, most, seeds)
        advantage = node_advantages(rows, trained, form)
        keep = torch.tensor(trained)
        return close(rows.only(keep), token_loss(rows, advantage)[keep], how, len(trees))

    return loss


def policy_part(row: Trajectory) -> list[int]:
    """The nodes of a row from where the policy goes on: the question, or the last node that a demonstration gave."""
    shown = [d for d, node in enumerate(row.leaf.line()) if node.author is Author.EXPERT]
    return row.forks[shown[-1] if shown else 0 :]


def node_advantages(rows: Rows, trained: list[bool], form: str) -> Tensor:
    """[B, L] advantages of the nodes that rows go through."""
    paths = [[(row.tree, node) for node in policy_part(row)] for row in rows.rows]
    owner = [[spot[:2] for spot in row.spots] for row in rows.rows]
    return textbook_trees.node_advantages(rows.reward, paths, owner, rows.logp.shape[1], trained, form)


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
    return grpo_loss(rows, advantage) + 0.05 * textbook.k3_plus(rows.logp, rows.reference) - 0.01 * rows.entropy


def treerl_loss(rows: Rows, advantage: Tensor) -> Tensor:
    return textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.26)


def attnrl_loss(rows: Rows, advantage: Tensor) -> Tensor:
    return dapo_loss(rows, advantage) + 0.001 * textbook.k3_plus(rows.logp, rows.reference)


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
        Mix((term(RECOMPUTED, Recomputed(), GroupMean(), TokenMean()),), kl_coef=0.05, entropy_bonus=0.01),
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
    "treepo_segments": Method(
        Mix((term(Clip(0.2, 0.28), Behavior(), SegmentValue(2, 0.7)),)), per_token(segment_value), clips=True
    ),
    "treepo_zscores": Method(
        Mix((term(Clip(0.2, 0.28), Behavior(), SegmentZScore(2)),)), per_token(segment_zscore), clips=True
    ),
    "node_values_some_leaves": Method(Mix((term(Clip(0.2, 0.28), Behavior(), NodeValue()),)), node_value, clips=True),
    "attnrl": Method(
        Mix((term(DualClip(0.2, 0.28, 3.0, "recomputed"), Recomputed(), GlobalLocal()),), kl_coef=0.001),
        on_nodes("paper", False, "token_mean", False, attnrl_loss),
        clips=True,
    ),
    "treerl": Method(
        Mix((term(Clip(0.2, 0.26), Behavior(), GlobalLocal(unbranched=True), SequenceMean()),)),
        on_nodes("paper", True, "sequence_mean", True, treerl_loss),
        clips=True,
    ),
    "treerl_released": Method(
        Mix((term(Clip(0.2, 0.26), Behavior(), GlobalLocal("released"), SequenceMean()),)),
        on_nodes("released", False, "sequence_mean", True, treerl_loss),
        clips=True,
    ),
    "rl_and_sft_per_question": Method(
        Mix((term(Clip(), Behavior(), GroupMean(std=False), QuestionMean()), EVERY_QUESTION)),
        lambda trees, evaluate: (
            outcome("dr_grpo", "question_mean", grpo_loss)(trees, evaluate)
            + 0.3 * sft(trees, evaluate, "question_mean")
        ),
        clips=True,
    ),
}

import methods_hapo  # noqa: E402, F401  it adds its rows to METHODS
import methods_hpt  # noqa: E402, F401  it adds its rows to METHODS
import methods_more  # noqa: E402, F401  it adds its rows to METHODS
import methods_recipes  # noqa: E402, F401  it adds its rows to METHODS
