"""Estimates of the KL term, KL-Cov, and tempered or untempered log-probs: in ramulus's terms, and as their textbook losses on flattened rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import textbook
from methods import GRPO, METHODS, RECOMPUTED, Evaluate, Method, Rows, close, grpo_loss, outcome, padded, rows_of, term
from ramulus.core.tree import Author, Tree
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.kl import KL
from ramulus.learn.objective.kl_cov import kl_cov
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, SequenceMean, Term, TokenMean
from ramulus.learn.objective.reference import Behavior, Recomputed

POLICY = (Author.POLICY,)


def grpo_and(pull: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """GRPO with a KL term by token mean, beside a loss by sequence mean."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        plain = rows_of(trees, evaluate, POLICY, False, policy_only=True)
        term = close(plain, pull(plain.logp, plain.reference), "token_mean", len(trees))
        return outcome("grpo", "sequence_mean", grpo_loss)(trees, evaluate) + 0.05 * term

    return loss


def plus(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A value with the gradient of k2."""

    def pull(logp: Tensor, frozen: Tensor) -> Tensor:
        k2 = (frozen - logp) ** 2 / 2
        return k2 + (value(frozen - logp) - k2).detach()

    return pull


PULLS = {
    KL("k1", clamp=None): lambda logp, frozen: logp - frozen,
    KL("kl", clamp=0.3): lambda logp, frozen: (logp - frozen).clamp(-0.3, 0.3),
    KL("abs", clamp=None): lambda logp, frozen: (logp - frozen).abs(),
    KL("k2", clamp=None): lambda logp, frozen: (logp - frozen) ** 2 / 2,
    KL("mse", clamp=0.3): lambda logp, frozen: ((logp - frozen) ** 2 / 2).clamp(-0.3, 0.3),
    KL("k3", clamp=None): textbook.k3,
    KL("low_var_kl", clamp=0.3): lambda logp, frozen: textbook.k3(logp, frozen).clamp(-0.3, 0.3),
    KL("k3+", clamp=0.3): plus(lambda x: (x.exp() - 1 - x).clamp(-0.3, 0.3)),
    KL("k1+", clamp=None): plus(lambda x: -x),
    KL("abs+"): plus(lambda x: x.abs().clamp(-10, 10)),
}


def kl_cov_loss(column: str, share: float, coef: float) -> Callable:
    """-A r + coef |log r| on the tokens of largest covariance (arXiv 2505.22617, as verl writes it), chosen by a recorded column."""

    def loss(trees: list[Tree], evaluate: Evaluate) -> Tensor:
        rows = rows_of(trees, evaluate, POLICY, True, policy_only=True)
        advantage = textbook.group_advantage(rows.reward, rows.group, "grpo")[:, None].expand_as(rows.logp)
        known, valid = of_rows(rows, trees, column), rows.mask > 0
        cov = ((advantage - advantage[valid].mean()) * (known - known[valid].mean()))[valid]
        chosen = torch.zeros_like(cov)
        chosen[torch.argsort(cov, descending=True, stable=True)[: max(1, int(share * len(cov) + 1e-9))]] = 1.0
        apart = rows.logp - rows.old
        pull = torch.zeros_like(apart)
        pull[valid] = chosen * apart[valid].abs()
        return ((-advantage * apart.exp() + coef * pull) * rows.mask).sum() / rows.mask.sum()

    return loss


def of_rows(rows: Rows, trees: list[Tree], name: str) -> Tensor:
    """[B, L] the sampler's log-probs, or a signal."""
    if name == "behavior":
        return rows.old
    nodes = [{node.id: node for node in tree.walk()} for tree in trees]
    return padded([torch.tensor([nodes[t][n].signals[name][k] for t, n, k in row.spots], dtype=torch.float64) for row in rows.rows])


def all_tempered(trees: list[Tree], evaluate: Evaluate) -> Tensor:
    """Ratio to the recomputed policy, KL term and entropy bonus, all at the temperature of sampling, as verl has them; a KL term by k3+."""
    rows = rows_of(trees, evaluate, POLICY, True, policy_only=True)
    advantage = textbook.group_advantage(rows.reward, rows.group, "grpo")[:, None].expand_as(rows.logp)
    each = textbook.ppo(rows.logp, of_rows(rows, trees, "recomputed_tempered"), advantage, 0.2, 0.2)
    each = each + 0.05 * textbook.k3_plus(rows.logp, of_rows(rows, trees, "reference_model_tempered")) - 0.01 * rows.entropy
    return close(rows, each, "token_mean", len(trees))


def lone_rows(trees: list[Tree], evaluate: Evaluate) -> Tensor:
    rows = rows_of(trees, evaluate, POLICY, True, policy_only=True)
    advantage = textbook.group_advantage(rows.reward, rows.group, "grpo", lone=1.0)[:, None].expand_as(rows.logp)
    return close(rows, grpo_loss(rows, advantage), "sequence_mean", len(trees))


WARM = Term(Estimator(RECOMPUTED, Recomputed(), GroupMean(), recomputed_tempered=True), normaliser=TokenMean())
COV = {"share": 0.3, "coef": 0.7}
METHODS |= {
    f"grpo_{kl.estimator}_{kl.clamp}": Method(
        Mix((GRPO,), kl_coef=0.05, kl=kl, normaliser=TokenMean()), grpo_and(pull), clips=True
    )
    for kl, pull in PULLS.items()
}
METHODS |= {
    "kl_cov": Method(Mix(kl_cov(**COV)), kl_cov_loss("behavior", **COV)),
    "kl_cov_recomputed": Method(
        Mix(kl_cov(**COV, chosen_by="recomputed_tempered")), kl_cov_loss("recomputed_tempered", **COV)
    ),
    "all_tempered": Method(
        Mix((WARM,), kl_coef=0.05, kl=KL(tempered=True), entropy_bonus=0.01, entropy_tempered=True),
        all_tempered,
        clips=True,
    ),
    "grpo_lone_reward": Method(
        Mix((term(Clip(), Behavior(), GroupMean(lone="reward"), SequenceMean()),)),
        lone_rows,
        clips=True,
    ),
}
