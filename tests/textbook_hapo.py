"""Textbook forms of HAPO and of the entropy-aware baselines, on padded rows of plain tensors. Imports nothing from ramulus.

Shapes: rows i of a batch, L columns. `logp`, `old`, `entropy` (now), `sampled` (entropy when sampled), `mask` are [B, L]; `reward` [B];
`group` [B] ints.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor


def token_group_advantage(reward: Tensor, group: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """[B, L] advantages whose mean and deviation run over every valid token of the group."""
    spread = reward[:, None].expand_as(mask)
    answer = torch.zeros_like(spread)
    for g in group.unique():
        rows = group == g
        tokens = spread[rows][mask[rows] > 0]
        if len(tokens) and not bool((tokens == tokens[0]).all()):
            answer[rows] = (spread[rows] - tokens.mean()) / (tokens.std(correction=0) + eps)
    return answer


def grpo_fallback(
    reward: Tensor, group: Tensor, mask: Tensor, advantage: Tensor, reach: float, width: int = 0, eps: float = 1e-6
) -> Tensor:
    """[B, L] advantages: groups with one that reaches the threshold take the sequence-level ones.

    Rows padded to a `width` hold rewards of 0 behind their valid tokens, whose advantages count in this test.
    """
    answer = advantage.clone()
    for g in group.unique():
        rows = group == g
        most = float((advantage[rows] * mask[rows]).abs().max())
        tokens = reward[rows][:, None].expand_as(mask[rows])[mask[rows] > 0]
        if len(tokens) and float(mask[rows].sum(1).min()) < width:
            most = max(most, float(tokens.mean().abs() / (tokens.std(correction=0) + eps)))
        if most >= reach:
            r = reward[rows]
            mean, spread = r.mean(), r.std() if len(r) > 1 else r.new_ones(())
            answer[rows] = ((r - mean) / (spread + eps))[:, None].expand_as(answer[rows])
    return answer


def signal(entropy: Tensor, sampled: Tensor, mask: Tensor, pivot: float, signed: bool) -> Tensor:
    """[B, L] h of the entropies now, by pivot and extremes of the valid entropies when sampled."""
    logs = torch.sort(sampled[mask > 0].clamp(min=1e-8).log()).values
    middle = logs[round(pivot * (len(logs) - 1))]
    u = entropy.detach().clamp(min=1e-8).log() - middle
    h = torch.where(u > 0, u / (logs[-1] - middle), u / (middle - logs[0])).clamp(-1, 1)
    return h if signed else h.abs()


def rank_signal(entropy: Tensor, sampled: Tensor, mask: Tensor, pivot: float, steps: int = 128) -> Tensor:
    """[B, L] h by the rank of the entropies now among the valid entropies when sampled, read between steps + 1 quantiles."""
    logs = np.sort(np.log(np.maximum(sampled[mask > 0].numpy(), 1e-8)))
    knots = logs[[round(i / steps * (len(logs) - 1)) for i in range(steps + 1)]]
    now = np.log(np.maximum(entropy.detach().numpy(), 1e-8))
    place = np.interp(now, knots, np.arange(steps + 1) / steps)
    return torch.from_numpy(np.where(place > pivot, (place - pivot) / (1 - pivot), (place - pivot) / pivot))


def hapo(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    h: Tensor,
    low: float,
    high: float,
    alpha: float,
    beta: float,
    dual: float,
    adapted_zone: bool,
) -> Tensor:
    """[B, L] losses per token: bounds by h, then advantages by h and ratio, then the clipped surrogate with dual clip."""
    ratio = torch.exp(logp - old)
    left = torch.where(h <= 0, low * (1 - alpha * h), torch.full_like(h, low))
    right = torch.where(h > 0, high * (1 + alpha * h), torch.full_like(h, high))
    zone = (left, right) if adapted_zone else (torch.full_like(h, low), torch.full_like(h, high))
    still = (ratio.detach() > 1 - zone[0] / 2) & (ratio.detach() < 1 + zone[1] / 2)
    touched = ((h > 0) & ~still) | ((h <= 0) & still)
    advantage = torch.where(touched, advantage * (1 + beta * h), advantage)
    loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - left, 1 + right))
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)


def forks(sampled: Tensor, mask: Tensor, share: float) -> Tensor:
    """[B, L] 1 on the valid tokens with the highest entropies when sampled."""
    valid = torch.sort(sampled[mask > 0], descending=True).values
    return ((sampled >= valid[math.ceil(share * len(valid) - 1e-9) - 1]) & (mask > 0)).double()


def entropy_advantage(advantage: Tensor, sampled: Tensor, alpha: float, kappa: float) -> Tensor:
    """[B, L] advantages with a bonus that never outweighs them."""
    return advantage + torch.minimum(alpha * sampled, advantage.abs() / kappa)


def clip_cov(advantage: Tensor, old: Tensor, mask: Tensor, share: float, low: float, high: float, seed: str) -> Tensor:
    """[B, L] advantages, 0 on a few tokens drawn among those of high covariance, row by row."""
    valid = mask > 0
    cov = (advantage - advantage[valid].mean()) * (old - old[valid].mean())
    near = [
        (i, t) for i in range(len(mask)) for t in range(mask.shape[1]) if valid[i, t] and low < float(cov[i, t]) < high
    ]
    answer = advantage.clone()
    for i, t in random.Random(seed).sample(near, min(len(near), max(1, int(share * int(valid.sum()))))):
        answer[i, t] = 0.0
    return answer
