"""HAPO and the entropy-aware baselines twice: in ramulus's terms, and as their textbook losses on flattened rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import textbook
import textbook_hapo as book
from methods import METHODS, Evaluate, Method, Rows, close, padded, rows_of, term
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.entropy_advantage import ClipCov, EntropyAdvantage
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.objective.entropy_signal import AdaptiveClip, EntropySignal, Redistribution
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, SequenceMean
from ramulus.learn.objective.reference import Behavior, Recomputed
from ramulus.learn.objective.token_weight import HighEntropy, ImportanceWeight, Product


def sampled_entropy(rows: Rows, trees: list[Tree]) -> Tensor:
    """[B, L] the entropy that each token was sampled at, 0 where it was not."""
    nodes = [{node.id: node for node in tree.walk()} for tree in trees]
    found = [[(nodes[t][n].entropy or [0.0] * (k + 1))[k] for t, n, k in row.spots] for row in rows.rows]
    return padded([torch.tensor(row, dtype=torch.float64) for row in found])


@dataclass
class Published:
    """HAPO's textbook loss with its switches."""

    signed: bool = True
    ranks: bool = False
    low: float = 0.2
    high: float = 0.28
    alpha: float = 1.0
    beta: float = 1.0
    dual: float = 3.0
    adapted_zone: bool = False
    tempered: bool = False
    cap: float | None = None
    fallback: float | None = None
    width: int = 0
    how: str = "token_mean"

    def __call__(self, trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, (Author.POLICY,), self.tempered, policy_only=True)
        advantage = book.token_group_advantage(rows.reward, rows.group, rows.mask)
        if self.fallback:
            advantage = book.grpo_fallback(rows.reward, rows.group, rows.mask, advantage, self.fallback, self.width)
        sampled = sampled_entropy(rows, trees)
        if self.ranks:
            h = book.rank_signal(rows.entropy, sampled, rows.mask, 0.8)
        else:
            h = book.signal(rows.entropy, sampled, rows.mask, 0.8, self.signed)
        numbers = (self.low, self.high, self.alpha, self.beta, self.dual, self.adapted_zone)
        loss = book.hapo(rows.logp, rows.old, advantage, h, *numbers)
        if self.cap is not None:
            behavior = padded([torch.tensor(row.behavior, dtype=torch.float64) for row in rows.rows])
            loss = loss * torch.exp(rows.old - behavior).clamp(max=self.cap)
        return close(rows, loss, self.how, len(trees))


def hapo(signal: EntropySignal, low=0.2, high=0.28, alpha=1.0, zone=0.0, column="recomputed", *more) -> Product:
    clip = AdaptiveClip(low, high, alpha, 3.0, signal, column)
    return Product((clip, Redistribution(1.0, low, high, zone, signal, column), *more))


def forking(rescale: bool) -> Callable[[list[Tree], Evaluate], Tensor]:
    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, (Author.POLICY,), True, policy_only=True)
        advantage = textbook.group_advantage(rows.reward, rows.group, "grpo")[:, None].expand_as(rows.logp)
        chosen = book.forks(sampled_entropy(rows, trees), rows.mask, 0.2)
        each = textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.28) * chosen
        return (each * rows.mask).sum() / (chosen if rescale else rows.mask).sum()

    return loss


def on_advantage(change: Callable[[Rows, list[Tree], Tensor], Tensor]) -> Callable[[list[Tree], Evaluate], Tensor]:
    """PPO on GRPO's advantages [B, L], changed token by token."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, (Author.POLICY,), True, policy_only=True)
        plain = textbook.group_advantage(rows.reward, rows.group, "grpo")[:, None].expand_as(rows.logp)
        advantage = change(rows, trees, plain)
        return close(rows, textbook.ppo(rows.logp, rows.old, advantage, 0.2, 0.28), "token_mean", len(trees))

    return loss


def bonus(rows: Rows, trees: list[Tree], advantage: Tensor) -> Tensor:
    return book.entropy_advantage(advantage, sampled_entropy(rows, trees), 0.4, 2.0)


def without_some(rows: Rows, trees: list[Tree], advantage: Tensor) -> Tensor:
    return book.clip_cov(advantage, rows.old, rows.mask, 0.05, 0.2, 2.0, f"{trees[0].seed}/{trees[0].step}/clip-cov")


SIGNED, RELEASED, RANKS = EntropySignal(), EntropySignal(signed=False), EntropySignal(scale="rank")
UNTEMPERED = (Recomputed(), TokenGroupMean())
METHODS |= {
    "hapo": Method(Mix((term(hapo(SIGNED), *UNTEMPERED),)), Published(), clips=True),
    "hapo_sequence_mean": Method(
        Mix((term(hapo(SIGNED), *UNTEMPERED, SequenceMean()),)), Published(how="sequence_mean"), clips=True
    ),
    "hapo_behavior": Method(
        Mix((term(hapo(SIGNED, column="behavior"), Behavior(), TokenGroupMean()),)),
        Published(tempered=True),
        clips=True,
    ),
    "hapo_weighted": Method(
        Mix((term(hapo(SIGNED, 0.2, 0.28, 1.0, 0.0, "recomputed", ImportanceWeight(1.5)), *UNTEMPERED),)),
        Published(cap=1.5),
        clips=True,
    ),
    "hapo_ranks": Method(Mix((term(hapo(RANKS), *UNTEMPERED),)), Published(ranks=True), clips=True),
    "hapo_released": Method(
        Mix((term(hapo(RELEASED, 0.2, 0.2, 1.0, 1.0), Recomputed(), TokenGroupMean(fallback=1.5)),)),
        Published(signed=False, high=0.2, adapted_zone=True, fallback=1.5),
        clips=True,
    ),
    "forking_tokens": Method(
        Mix((term(Product((Clip(0.2, 0.28), HighEntropy(0.2))), Behavior(), GroupMean()),)), forking(False), clips=True
    ),
    "forking_tokens_rescaled": Method(
        Mix((term(Product((Clip(0.2, 0.28), HighEntropy(0.2, rescale=True))), Behavior(), GroupMean()),)),
        forking(True),
        clips=True,
    ),
    "entropy_advantage": Method(
        Mix((term(Clip(0.2, 0.28), Behavior(), EntropyAdvantage()),)), on_advantage(bonus), clips=True
    ),
    "clip_cov": Method(
        Mix((term(Clip(0.2, 0.28), Behavior(), ClipCov(share=0.05, low=0.2, high=2.0)),)),
        on_advantage(without_some),
        clips=True,
    ),
}
