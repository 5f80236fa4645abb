"""Textbook losses on padded rows of plain tensors, as the papers write them. Imports nothing from ramulus.

Shapes: rows i of a batch, L columns. `logp`, `old`, `mask` are [B, L], `reward` [B], `group` [B] ints.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def group_advantage(reward: Tensor, group: Tensor, kind: str, eps: float = 1e-6, lone: float = 0.0) -> Tensor:
    """[B] outcome advantages: grpo (sample std), dr_grpo (mean only), rloo (mean of the others); a lone row earns `lone` times its reward."""
    answer = torch.zeros_like(reward)
    for g in group.unique():
        rows = group == g
        r = reward[rows]
        if len(r) == 1:
            answer[rows] = lone * r
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
            baseline = float(r.mean())
            weight = len(mine) if weighting == "group_size" else 1
            total += weight * (float(reward[i]) - baseline)
            weights += weight
        answer[i] = total / weights if weights else 0.0
    return answer


def level_tree(group: Tensor, labels: list[tuple]) -> tuple[dict[tuple, list], list[list[tuple]]]:
    """Prefix -> what hangs below it (longer prefixes, and row numbers that end there), and each row's prefixes, its question's first."""
    below: dict[tuple, list] = {}
    paths = []
    for i, path in enumerate(labels):
        prefixes = [(int(group[i]), *path[:j]) for j in range(len(path) + 1)]
        for above, here in itertools.pairwise(prefixes):
            if here not in below.setdefault(above, []):
                below[above].append(here)
        below.setdefault(prefixes[-1], []).append(i)
        paths.append(prefixes)
    return below, paths


def level_value(below: dict[tuple, list], score: Tensor, key: tuple | int) -> float:
    """A row's score, or the plain mean of what hangs below a prefix."""
    if isinstance(key, int):
        return float(score[key])
    parts = [level_value(below, score, part) for part in below[key]]
    return sum(parts) / len(parts)


def grid(steps: list[float], size: int, length: int) -> Tensor:
    """Token t takes the value of level t // size, 0 beyond the last."""
    return torch.tensor(
        [steps[t // size] if t // size < len(steps) else 0.0 for t in range(length)], dtype=torch.float64
    )


def segment_advantage(
    reward: Tensor, group: Tensor, labels: list[tuple], lengths: list[int], size: int, eta: float
) -> list[Tensor]:
    """TreePO's code-only segment estimator before whitening: value of a level minus the discounted value of the one above it."""
    score = torch.zeros_like(reward)
    for i, path in enumerate(labels):
        groups = [
            [k for k in range(len(labels)) if group[k] == group[i] and labels[k][:j] == path[:j]]
            for j in range(len(path) + 1)
        ]
        total = sum(len(g) * float(reward[i] - reward[g].mean()) for g in groups)
        score[i] = total / sum(len(g) for g in groups)
    below, paths = level_tree(group, labels)
    answer = []
    for i, prefixes in enumerate(paths):
        k = len(prefixes) - 1
        value = [0.0] + [level_value(below, score, p) for p in prefixes[1:]]
        answer.append(grid([value[j] - eta ** (k - j + 1) * value[j - 1] for j in range(1, k + 1)], size, lengths[i]))
    return answer


def spo_advantage(reward: Tensor, group: Tensor, labels: list[tuple], lengths: list[int], size: int) -> list[Tensor]:
    """The code-only variant with values z-scored among the levels that hang from the same one; only children keep theirs."""
    reward = torch.stack([r if int((group == g).sum()) > 1 else r * 0 for r, g in zip(reward, group, strict=True)])
    below, paths = level_tree(group, labels)
    scored: dict[tuple, float] = {}
    for parts in below.values():
        siblings = [part for part in parts if isinstance(part, tuple)]
        values = torch.tensor([level_value(below, reward, p) for p in siblings], dtype=torch.float64)
        for here, value in zip(siblings, values, strict=True):
            spread = float(values.std(correction=0))
            scored[here] = (
                float(value) if len(values) == 1 else float((value - values.mean()) / spread) if spread > 1e-8 else 0.0
            )
    answer = []
    for i, prefixes in enumerate(paths):
        value = [0.0] + [scored[p] for p in prefixes[1:]]
        answer.append(grid([b - a for a, b in itertools.pairwise(value)], size, lengths[i]))
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


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """[B, L] the k3 estimate of KL(pi || reference)."""
    d = reference - logp
    return d.exp() - d - 1


def k3_plus(logp: Tensor, frozen: Tensor) -> Tensor:
    """[B, L] verl's "k3+": the value of k3, held in +-10, with the gradient of k2."""
    k2 = (frozen - logp) ** 2 / 2
    return k2 + (k3(logp, frozen).clamp(-10, 10) - k2).detach()


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
