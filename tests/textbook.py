"""Textbook losses on padded rows of plain tensors, as the papers write them. Imports nothing from ramify.

Shapes: rows i of a batch, L columns. `logp`, `old`, `mask` are [B, L], `reward` [B], `group` [B] ints.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(reward: Tensor, group: Tensor, kind: str, eps: float = 1e-6) -> Tensor:
    """[B] outcome advantages: grpo (sample std), dr_grpo (mean only), rloo (mean of the others)."""
    answer = torch.zeros_like(reward)
    for g in group.unique():
        rows = group == g
        r = reward[rows]
        if len(r) == 1:
            answer[rows] = r
        elif kind == "grpo":
            answer[rows] = (r - r.mean()) / (r.std() + eps)
        elif kind == "dr_grpo":
            answer[rows] = r - r.mean()
        elif kind == "rloo":
            answer[rows] = r - (r.sum() - r) / (len(r) - 1)
        else:
            raise ValueError(kind)
    return answer


def treepo_advantage(
    reward: Tensor, group: Tensor, labels: list[tuple], lengths: Tensor, weighting: str, root: bool, reject: bool
) -> Tensor:
    """[B] TreePO advantages before whitening (arXiv 2508.17445, eqs. 5-7), from label paths, by looking at every pair of rows."""
    deepest = max(len(path) for path in labels)
    answer = torch.zeros_like(reward)
    for i, path in enumerate(labels):
        total, weights = 0.0, 0.0
        for j in range(0 if root else 1, min(len(path), deepest - 1) + 1):
            mine = [k for k in range(len(labels)) if group[k] == group[i] and labels[k][:j] == path[:j]]
            r = reward[mine]
            if j > 0 and (len(mine) < 2 or (reject and bool((r == r[0]).all()))):
                continue
            baseline = 0.0 if len(mine) == 1 else float(r.mean())
            weight = len(mine) if weighting == "group_size" else 1
            total += weight * (float(reward[i]) - baseline)
            weights += weight
        answer[i] = total / weights if weights else 0.0
    return answer


def whiten(advantage: Tensor, mask: Tensor) -> Tensor:
    """[B, L] values whitened over valid tokens, as REINFORCE++ does."""
    n = mask.sum()
    mean = (advantage * mask).sum() / (n + 1e-8)
    var = ((advantage - mean) ** 2 * mask).sum() / (n + 1e-8) * n / max(float(n) - 1, 1)
    return (advantage - mean) / torch.sqrt(var + 1e-8) * mask


def reinforce(logp: Tensor, advantage: Tensor) -> Tensor:
    """[B, L] losses per token."""
    return -advantage * logp


def ppo(logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """[B, L] losses per token: the clipped surrogate, with a dual clip if asked."""
    ratio = torch.exp(logp - old)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    if dual is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)
    return loss


def k3(logp: Tensor, frozen: Tensor) -> Tensor:
    """[B, L] the k3 estimate of KL(pi || frozen)."""
    d = frozen - logp
    return d.exp() - d - 1


def aggregate(
    loss: Tensor,
    mask: Tensor,
    how: str,
    group: Tensor,
    length: int = 0,
    questions: int = 0,
    row_weight: Tensor | None = None,
) -> Tensor:
    """[B, L] losses per token -> scalar: token_mean, sequence_mean, constant (over one length) or question_mean."""
    weight = torch.ones(len(loss), dtype=loss.dtype) if row_weight is None else row_weight
    summed = (loss * mask).sum(1)
    if how == "token_mean":
        return (weight * summed).sum() / (weight * mask.sum(1)).sum()
    if how == "sequence_mean":
        return (weight * summed / mask.sum(1)).sum() / weight.sum()
    if how == "constant":
        return (weight * summed).sum() / length / weight.sum()
    per_row = summed / mask.sum(1)
    total = loss.new_zeros(())
    for g in group.unique():
        rows = group == g
        total = total + (weight[rows] * per_row[rows]).sum() / int(rows.sum()) / questions
    return total
