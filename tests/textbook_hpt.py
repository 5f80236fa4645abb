"""Textbook losses of the methods that learn from demonstrations or weigh whole sequences; plain tensors, nothing of ramulus.

Shapes as in textbook.py; `expert` [B, L] is 1 on the tokens of a demonstration.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

LEGENDRE = np.polynomial.legendre.leggauss(300)


def union_advantage(reward: Tensor, group: Tensor, std: bool) -> Tensor:
    """[B] over rollouts and demonstrations of a question together (arXiv 2504.14945, eq. 4); a lone row earns nothing."""
    answer = torch.zeros_like(reward)
    for g in group.unique():
        r = reward[group == g]
        if len(r) > 1:
            answer[group == g] = (r - r.mean()) / (r.std() + 1e-6) if std else r - r.mean()
    return answer


def whitened_returns(reward: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """[B, L] REINFORCE++: discounted reward to go, whitened over all valid tokens; rows' valid tokens may have gaps."""
    to_go = torch.zeros_like(mask)
    for i in range(len(mask)):
        spots = mask[i].nonzero()[:, 0].tolist()
        for k, t in enumerate(reversed(spots)):
            to_go[i, t] = reward[i] * gamma**k
    n = mask.sum()
    mean = (to_go * mask).sum() / (n + 1e-8)
    var = ((to_go - mean) ** 2 * mask).sum() / (n + 1e-8) * n / (n - 1)
    return (to_go - mean) / torch.sqrt(var + 1e-8) * mask


def cispo(logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """[B, L] -sg(clip(r)) A log pi."""
    weight = torch.exp(logp - old).clamp(1 - low, 1 + high).detach()
    return -weight * advantage * logp


def mixed(logp: Tensor, old: Tensor, advantage: Tensor, expert: Tensor, gamma: float, clip: float | None) -> Tensor:
    """[B, L] LUFFY: f(p) on demonstrations, the (clipped) ratio on rollouts."""
    p = logp.exp()
    ratio = torch.exp(logp - old)
    on = -advantage * ratio
    if clip is not None:
        on = torch.maximum(on, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return torch.where(expert > 0, -advantage * p / (p + gamma), on)


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, L] -> [B], over valid tokens."""
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def gspo(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """[B] losses per row: the clipped sequence ratio."""
    s = row_mean(logp - old, mask).exp()
    return -torch.minimum(s * advantage, s.clamp(1 - low, 1 + high) * advantage)


def gmpo(logp: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """[B] losses per row: the geometric mean of token ratios that are clipped on the pessimistic side, as the paper's pseudo-code."""
    sign = torch.where(advantage > 0, 1.0, -1.0)[:, None]
    log_ratio = logp - old
    edge = log_ratio.clamp(math.log(1 - low), math.log(1 + high))
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * edge)
    return -advantage * row_mean(pessimistic, mask).exp()


def entropy_weight(entropy: Tensor, mask: Tensor, scale: float, slope: float) -> Tensor:
    """[B, 1] SRFT's weight of a row, a constant."""
    return (scale * (slope * row_mean(entropy, mask)).exp()).detach()[:, None]


def switch(correct: Tensor, group: Tensor, alone: Tensor, demo: Tensor, questions: int, gamma: float) -> list[bool]:
    """For each question: is it learned from its demonstration? `alone` and `demo` [B] bool tell rows apart."""
    answer = []
    for g in range(questions):
        here = group == g
        rolled = correct[here & alone]
        rate = float(rolled.mean()) if len(rolled) else 0.0
        answer.append(bool((here & demo).any()) and rate <= gamma)
    return answer


def beta_below(x: float, a: float, b: float) -> float:
    """P(Beta(a, b) <= x) by Gauss-Legendre quadrature in the square root of the variable, where it is smooth for a = 1/2."""
    t = math.sqrt(x) * (LEGENDRE[0] + 1) / 2
    area = math.sqrt(x) / 2 * float((LEGENDRE[1] * 2 * t ** (2 * a - 1) * (1 - t**2) ** (b - 1)).sum())
    return area * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """[B, L] advantages and returns (arXiv 1506.02438): the reward comes with the last valid token."""
    advantage, target = torch.zeros_like(value), torch.zeros_like(value)
    for i in range(len(value)):
        spots = mask[i].nonzero()[:, 0].tolist()
        last, after = 0.0, 0.0
        for k, t in enumerate(reversed(spots)):
            delta = (float(reward[i]) if k == 0 else 0.0) + gamma * after - float(value[i, t])
            last = delta + gamma * lam * last
            after = float(value[i, t])
            advantage[i, t], target[i, t] = last, last + after
    return advantage, target
