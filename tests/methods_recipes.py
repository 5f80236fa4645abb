"""The mixes of shipped recipes that no other row holds: in ramulus's terms, and as their textbook losses on flattened rows."""

from __future__ import annotations

import torch
from torch import Tensor

import textbook
import textbook_hapo
from methods import METHODS, Evaluate, Method, dapo_loss, node_advantages, on_nodes, rows_of, term, treerl_loss
from methods_hapo import RANKS, RELEASED, Published, hapo, sampled_entropy
from methods_hpt import BOTH, GAMMA, SHAPED, SHOWN, demonstrations, hpt, luffy, on_policy, question_sum, smooth
from ramulus.core.tree import Tree
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.advantage.group import GroupMean
from ramulus.learn.advantage.token_group import TokenGroupMean
from ramulus.learn.objective.gate import Smooth, Switch
from ramulus.learn.objective.mask import Clip, DualClip, Everything
from ramulus.learn.objective.mix import ConstantLength, Mix, QuestionMean, SequenceMean, TokenMean
from ramulus.learn.objective.reference import Behavior, Recomputed


def attnrl(trees: list[Tree], evaluate: Evaluate) -> Tensor:
    """Ratios at the temperature of sampling, the KL term at 1."""
    pull = on_nodes("paper", False, "token_mean", True, dapo_loss)(trees, evaluate)
    kl = on_nodes("paper", False, "token_mean", False, lambda rows, _: textbook.k3_plus(rows.logp, rows.reference))
    return pull + 0.05 * kl(trees, evaluate)


def ramulus(trees: list[Tree], evaluate: Evaluate) -> Tensor:
    """HAPO's clip and credit by ranks on AttnRL's advantages, or SFT (0.3), as HPT's smooth gate weighs them; shares split at forks."""
    sft = smooth(rows_of(trees, evaluate, BOTH, True, policy_only=False), len(trees))
    rows = on_policy(trees, evaluate)
    every = torch.ones(len(rows.reward), dtype=torch.bool)
    advantage = node_advantages(rows, every.tolist(), "paper")
    h = textbook_hapo.rank_signal(rows.entropy, sampled_entropy(rows, trees), rows.mask, 0.8)
    rl = textbook_hapo.hapo(rows.logp, rows.old, advantage, h, 0.2, 0.28, 1.0, 1.0, 3.0, adapted_zone=True)
    demos, whole = demonstrations(trees, evaluate)
    imitation = 0.3 * question_sum(demos, -demos.logp, whole, sft, by_fork=True)
    return question_sum(rows, rl, every, [1 - s for s in sft], by_fork=True) + imitation


UNCLIPPED = term(Everything(), Behavior(), GroupMean(std=False), QuestionMean())
MIXED = term(Everything(), SHAPED, GroupMean(std=False, over="all"), ConstantLength(9), BOTH)
RL = term(hapo(RANKS, 0.2, 0.28, 1.0, 1.0, "behavior"), Behavior(), GlobalLocal(unbranched=True), QuestionMean())
PADDED = TokenGroupMean(fallback=1.5, width=40)
METHODS |= {
    "attnrl_behavior": Method(
        Mix((term(DualClip(0.2, 0.28, 3.0), Behavior(), GlobalLocal()),), kl_coef=0.05), attnrl, clips=True
    ),
    "treerl_branched": Method(
        Mix((term(Clip(0.2, 0.26), Behavior(), GlobalLocal(), SequenceMean()),)),
        on_nodes("paper", False, "sequence_mean", True, treerl_loss),
        clips=True,
    ),
    "treerl_some": Method(
        Mix((term(Clip(0.2, 0.26), Behavior(), GlobalLocal(trained=2), SequenceMean()),)),
        on_nodes("paper", False, "sequence_mean", True, treerl_loss, 2),
        clips=True,
    ),
    "hapo_released_padded": Method(
        Mix((term(hapo(RELEASED, 0.2, 0.2, 1.0, 1.0), Recomputed(), PADDED),)),
        Published(signed=False, high=0.2, adapted_zone=True, fallback=1.5, width=40),
        clips=True,
    ),
    "hpt_unclipped": Method(
        Mix((UNCLIPPED, SHOWN), entropy_bonus=0.01, gate=Switch(GAMMA), normaliser=TokenMean()),
        hpt("switch", clip=None, bonus=0.01),
    ),
    "luffy_bonus": Method(
        Mix((MIXED,), entropy_bonus=0.01, normaliser=TokenMean()), luffy(False, None, "constant", 0.01)
    ),
    "ramulus": Method(Mix((RL, SHOWN), share="each_fork", gate=Smooth(GAMMA)), ramulus, clips=True),
}
