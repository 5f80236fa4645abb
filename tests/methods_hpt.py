"""The unified policy gradient's table row by row: baselines, sequence ratios, demonstrations in the group, gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import textbook
import textbook_hpt as book
from methods import METHODS, Evaluate, Method, Rows, close, fork_weights, outcome, rows_of, term
from ramulus.core.tree import Author, Tree, column
from ramulus.learn.advantage.baselines import Raw, Right, Signed, Whitened
from ramulus.learn.advantage.gae import GAE
from ramulus.learn.advantage.group import Constant, GroupMean
from ramulus.learn.batch.tree_batch import Credits
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.gate import Smooth, Switch
from ramulus.learn.objective.leaf_weight import EntropyWeight, GeometricMean, SequenceRatio
from ramulus.learn.objective.mask import Clip, Everything
from ramulus.learn.objective.mix import ConstantLength, Mix, QuestionMean, SequenceMean, Term, TokenMean
from ramulus.learn.objective.per_author import PerAuthor
from ramulus.learn.objective.reference import Behavior, Itself
from ramulus.learn.objective.shaped_reference import Capped, One, Shaped

BOTH = (Author.POLICY, Author.EXPERT)
EXPERT = (Author.EXPERT,)
GAMMA = 0.3  # a threshold that the random forests lie on both sides of


def weighted(leaf, advantage, normaliser=None, mask=None, authors=(Author.POLICY,), coefficient=1.0) -> Term:
    """A term whose credit a leaf weight multiplies."""
    return Term(Estimator(mask or Everything(), Itself(), advantage, leaf), authors, normaliser, coefficient)


def by_author(rows: Rows, author: Author) -> Tensor:
    """[B, L] 1 on the tokens of one author."""
    answer = torch.zeros_like(rows.mask)
    for i, row in enumerate(rows.rows):
        answer[i, : len(row.authors)] = torch.tensor([float(a is author) for a in row.authors])
    return answer


def on_policy(trees: list[Tree], evaluate: Evaluate) -> Rows:
    return rows_of(trees, evaluate, (Author.POLICY,), True, policy_only=True)


def group(rows: Rows) -> Tensor:
    return textbook.group_advantage(rows.reward, rows.group, "grpo")


def signs(rows: Rows) -> Tensor:
    return torch.where(rows.reward > 0, 1.0, -1.0).double()


def reinforce(advantage: Callable[[Rows], Tensor]) -> Callable:
    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = on_policy(trees, evaluate)
        given = advantage(rows)[:, None].expand_as(rows.logp)
        return close(rows, textbook.reinforce(rows.logp, given), "sequence_mean", len(trees))

    return loss


def reinforce_plus_plus(gamma: float) -> Callable:
    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = on_policy(trees, evaluate)
        advantage = book.whitened_returns(rows.reward, rows.mask, gamma)
        return close(rows, textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.2), "token_mean", len(trees))

    return loss


def per_row(token_loss: Callable, low: float, high: float) -> Callable:
    """A loss [B] of whole sequences, averaged over rows."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = on_policy(trees, evaluate)
        answer = token_loss(rows.logp, rows.old, group(rows), rows.mask, low, high)
        return answer[rows.mask.sum(1) > 0].mean()

    return loss


def luffy(std: bool, clip: float | None, how: str, bonus: float = 0.0) -> Callable:
    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, BOTH, True, policy_only=False)
        advantage = book.union_advantage(rows.reward, rows.group, std)[:, None].expand_as(rows.logp)
        given = book.mixed(rows.logp, rows.old, advantage, by_author(rows, Author.EXPERT), 0.1, clip)
        return close(rows, given, how, len(trees), 9) - bonus * close(rows, rows.entropy, "token_mean", len(trees))

    return loss


def srft(trees: list[Tree], evaluate: Evaluate) -> Tensor:
    """The three parts of arXiv 2506.19767, each an expectation over questions."""
    demos = rows_of(trees, evaluate, EXPERT, True, policy_only=False)
    weight = book.entropy_weight(demos.entropy, demos.mask, 0.5, -1.0)
    advantage = book.union_advantage(demos.reward, demos.group, True)[:, None]
    total = close(demos, -weight * demos.logp, "question_mean", len(trees))
    total = total + close(demos, -advantage * demos.logp.exp(), "question_mean", len(trees))
    rows = on_policy(trees, evaluate)
    good = book.entropy_weight(rows.entropy, rows.mask, 0.1, 1.0)
    pull = torch.where(rows.reward[:, None] > 0, good, -torch.ones_like(good))
    return total + close(rows, -pull * rows.logp, "question_mean", len(trees))


def state_value(tree: int, node: int, offset: int) -> float:
    """A made-up value of the state before a token."""
    return math.sin(3.7 * tree + 1.3 * node + 0.9 * offset)


@dataclass(frozen=True)
class Valued:
    """GAE on made-up values."""

    rule: GAE
    needs: ClassVar[tuple[str, ...]] = ("value",)

    def __call__(self, forest: Sequence[Tree]) -> list[Credits]:
        scored = copy.deepcopy(list(forest))
        for t, tree in enumerate(scored):
            for node in tree.walk():
                node.signals["value"] = column((state_value(t, node.id, k) for k in range(len(node.tokens))), "d")
        return self.rule(scored)


def returns(rows: Rows, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """[B, L] advantages and targets of flattened rows."""
    value = torch.zeros_like(rows.logp)
    for i, row in enumerate(rows.rows):
        value[i, : len(row.spots)] = torch.tensor([state_value(*spot) for spot in row.spots], dtype=torch.float64)
    return book.gae(rows.reward, value, rows.mask, gamma, lam)


def ppo(gamma: float, lam: float, whiten: bool) -> Callable:
    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = on_policy(trees, evaluate)
        advantage, _ = returns(rows, gamma, lam)
        advantage = textbook.whiten(advantage, rows.mask) if whiten else advantage
        return close(rows, textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.2), "token_mean", len(trees))

    return loss


def demonstrations(trees: list[Tree], evaluate: Evaluate) -> tuple[Rows, Tensor]:
    """Rows of expert tokens, and which of them are whole demonstrations."""
    rows = rows_of(trees, evaluate, EXPERT, True, policy_only=False)
    return rows, torch.tensor([row.leaf.author is Author.EXPERT for row in rows.rows])


def alone(rows: Rows) -> Tensor:
    """[B] is a row the policy's own from its first token?"""
    return torch.tensor(
        [row.leaf.author is Author.POLICY and Author.EXPERT not in row.authors for row in rows.rows], dtype=torch.bool
    )


def question_sum(rows: Rows, losses: Tensor, keep: Tensor, weights: list[float], by_fork: bool = False) -> Tensor:
    """Each question's mean over its kept rows of their token means, times the question's weight, over all questions."""
    total = losses.sum() * 0
    filled = rows.mask.sum(1) > 0
    for g, weight in enumerate(weights):
        here = (rows.group == g) & keep & filled
        if weight and bool(here.any()):
            each = book.row_mean(losses, rows.mask)[here]
            each = each * fork_weights(rows.only(here)) if by_fork else each
            total = total + weight * each.mean() / len(weights)
    return total


def hpt(
    gate: str, keep_right: bool = False, off: float | None = None, clip: float | None = 0.2, bonus: float = 0.0
) -> Callable:
    """Each question by its rollouts (Dr.GRPO) or by its demonstration (SFT, 0.3), as the gate weighs the two."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        everyone = rows_of(trees, evaluate, BOTH, True, policy_only=False)
        sft, other = (
            smooth(everyone, len(trees)) if gate == "smooth" else switched(everyone, len(trees)),
            [0.0] * len(trees),
        )
        if off is not None:
            other = [w - s for w, s in zip(switched(everyone, len(trees), off), sft, strict=True)]
        rl = [1 - a - b for a, b in zip(sft, other, strict=True)]
        rows = on_policy(trees, evaluate)
        advantage = textbook.group_advantage(rows.reward, rows.group, "dr_grpo")[:, None].expand_as(rows.logp)
        every = torch.ones(len(rows.reward), dtype=torch.bool)
        surrogate = -advantage * torch.exp(rows.logp - rows.old)
        surrogate = surrogate if clip is None else textbook.ppo(rows.logp, rows.old, advantage, clip, clip)
        total = question_sum(rows, surrogate, every, rl)
        demos, whole = demonstrations(trees, evaluate)
        total = total + question_sum(demos, -0.3 * demos.logp, whole, sft)
        if bonus:
            kept = [(rows, torch.tensor(rl)[rows.group]), (demos, torch.tensor(sft)[demos.group] * whole)]
            summed = sum((part.entropy * part.mask * weight[:, None]).sum() for part, weight in kept)
            total = total - bonus * summed / sum((part.mask * weight[:, None]).sum() for part, weight in kept)
        if off is not None:
            p = demos.logp.exp()
            total = total + question_sum(demos, -demos.reward[:, None] * p / (p + 0.1), whole, other)
        if keep_right:
            total = total + 0.5 * question_sum(rows, -rows.logp, rows.reward > 0, sft)
        return total

    return loss


def switched(everyone: Rows, questions: int, gamma: float = GAMMA) -> list[float]:
    """1 for a question that is learned from its demonstration, as its solve rate is at most gamma, else 0."""
    shown = torch.tensor([row.leaf.author is Author.EXPERT for row in everyone.rows])
    correct = (everyone.reward > 0).double()
    return [float(x) for x in book.switch(correct, everyone.group, alone(everyone), shown, questions, gamma)]


def smooth(everyone: Rows, questions: int) -> list[float]:
    """The probability that a question's solve rate is at most 0.3, a posteriori; rows with a common first segment are one draw, their mean."""
    correct, group = (everyone.reward > 0).double(), everyone.group
    shown = torch.tensor([row.leaf.author is Author.EXPERT for row in everyone.rows])
    tops = torch.tensor([row.leaf.line()[1].id for row in everyone.rows])
    answer = []
    for g in range(questions):
        mine = (group == g) & alone(everyone)
        tried = [float(correct[mine & (tops == top)].mean()) for top in tops[mine].unique()]
        a, b = 0.5 + sum(tried), 0.5 + len(tried) - sum(tried)
        answer.append(book.beta_below(GAMMA, a, b) if bool((shown & (group == g)).any()) else 0.0)
    return answer


DR_GRPO = term(Clip(), Behavior(), GroupMean(std=False), QuestionMean())
SHOWN = term(Everything(), Itself(), Constant(over="expert"), QuestionMean(), EXPERT, 0.3)
OFF = replace(term(Everything(), Shaped(), Raw(over="expert"), QuestionMean(), EXPERT), side="off")
KEPT = Term(Estimator(Everything(), Itself(), Right()), (Author.POLICY,), None, 0.5, Author.EXPERT)
SHAPED = PerAuthor(Behavior(), Shaped(0.1))
METHODS |= {
    "ppo": Method(
        Mix((term(Clip(), Behavior(), Valued(GAE(1.0, 0.95))),), value=0.5), ppo(1.0, 0.95, True), clips=True
    ),
    "ppo_discounted": Method(
        Mix((term(Clip(), Behavior(), Valued(GAE(0.9, 0.8, whiten=False))),), value=0.5),
        ppo(0.9, 0.8, False),
        clips=True,
    ),
    "reinforce": Method(Mix((term(Everything(), Itself(), Signed(), SequenceMean()),)), reinforce(signs)),
    "reinforce_raw": Method(
        Mix((term(Everything(), Itself(), Raw(), SequenceMean()),)), reinforce(lambda rows: rows.reward)
    ),
    "reinforce_plus_plus": Method(Mix((term(Clip(), Behavior(), Whitened()),)), reinforce_plus_plus(1.0), clips=True),
    "reinforce_plus_plus_discounted": Method(
        Mix((term(Clip(), Behavior(), Whitened(0.8)),)), reinforce_plus_plus(0.8), clips=True
    ),
    "cispo": Method(
        Mix((term(Everything(), Capped(0.2, 0.28), GroupMean()),)),
        outcome("grpo", "token_mean", lambda rows, a: book.cispo(rows.logp, rows.old, a, 0.2, 0.28)),
    ),
    "gspo": Method(
        Mix((weighted(SequenceRatio(0.2, 0.1), GroupMean(), SequenceMean()),)), per_row(book.gspo, 0.2, 0.1)
    ),
    "gmpo": Method(
        Mix((weighted(GeometricMean(Clip(0.3, 0.4)), GroupMean(), SequenceMean(), Clip(0.3, 0.4)),)),
        per_row(book.gmpo, 0.3, 0.4),
        clips=True,
    ),
    "luffy": Method(
        Mix((term(Everything(), SHAPED, GroupMean(std=False, over="all"), ConstantLength(9), BOTH),)),
        luffy(False, None, "constant"),
    ),
    "luffy_clipped": Method(
        Mix((term(PerAuthor(Clip(), Everything()), SHAPED, GroupMean(over="all"), TokenMean(), BOTH),)),
        luffy(True, 0.2, "token_mean"),
        clips=True,
    ),
    "srft": Method(
        Mix(
            (
                weighted(EntropyWeight(0.5, -1.0), Constant(), QuestionMean(), authors=EXPERT),
                term(Everything(), One(), GroupMean(over="all"), QuestionMean(), EXPERT),
                weighted(EntropyWeight(0.1, 1.0), Signed(), QuestionMean()),
            )
        ),
        srft,
    ),
    "hpt": Method(Mix((DR_GRPO, SHOWN), gate=Switch(GAMMA)), hpt("switch"), clips=True),
    "hpt_smooth": Method(Mix((DR_GRPO, SHOWN), gate=Smooth(GAMMA)), hpt("smooth"), clips=True),
    "hpt_keeps_the_right": Method(
        Mix((DR_GRPO, SHOWN, KEPT), gate=Switch(GAMMA)), hpt("switch", keep_right=True), clips=True
    ),
    "hpt_off_policy": Method(Mix((DR_GRPO, SHOWN, OFF), gate=Switch(GAMMA, off=0.6)), hpt("switch", off=0.6)),
}
