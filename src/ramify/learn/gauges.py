"""Gauges: what the maths did, recomputed beside it from log-probs and a batch; nothing here is differentiated."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ramify.core.tree import Author
from ramify.learn.batch import TreeBatch
from ramify.learn.mix import Mix

EXTREMES = {"ratio_max": max, "ratio_min": min, "mismatch_max": max}


@torch.no_grad()
def surrogate(mix: Mix, tempered: Tensor, plain: Tensor, entropy: Tensor, batch: TreeBatch) -> float:
    """The textbook loss of this row, for example PPO's -sum min(r A, clip(r) A); rows add up.

    A mask with `clamp` and a reference with `potential` have one; others raise AttributeError.
    """
    total = mix.extras(plain, entropy, batch)
    for m, term in enumerate(mix.terms):
        part, rule = batch.term(m), term.estimator
        logp = tempered if rule.tempered else plain
        up, down = (rule.reference.potential(rule.mask.clamp(sign, logp, part), part) for sign in (1, -1))
        total = total - term.coefficient * (part.gain * up + part.pain * down).sum()
    return float(total)


@torch.no_grad()
def gauges(mix: Mix, tempered: Tensor, plain: Tensor, entropy: Tensor, batch: TreeBatch) -> dict[str, float]:
    """Sums over this row for `merge`; a shared token counts once per trained leaf below it.

    Clip fractions are shares of credit: of the positive credit how much lies above the clip, of the negative how much below it.
    """
    sums: dict[str, float] = {}
    for m, term in enumerate(mix.terms):
        part, rule = batch.term(m), term.estimator
        logp = tempered if rule.tempered else plain
        for name, sign, credit in (("clip_high", 1, part.gain), ("clip_low", -1, -part.pain)):
            cut = credit * (rule.mask(sign, logp, entropy, part) == 0)
            add(sums, name, float(cut.sum()), float(credit.sum()))
    leaves = batch.leaves.amax(0)
    add(sums, "entropy", float((leaves * entropy).sum()), float(leaves.sum()))
    sampled = (leaves > 0) & (batch.author == int(Author.POLICY)) & (batch.temperature > 0)
    sampled &= (batch.behavior != 0) | (batch.entropy > 0)  # a sure token has log-prob 0, one that was not sampled neither
    if bool(sampled.any()):
        weight, apart = leaves[sampled], (tempered - batch.behavior)[sampled].clamp(-20, 20)
        add(sums, "kl_sampler", float((weight * (apart.exp() - apart - 1)).sum()), float(weight.sum()))
        ratio = apart.exp()
        sums |= {
            "ratio_max": float(ratio.max()),
            "ratio_min": float(ratio.min()),
            "mismatch_max": float(apart.abs().max()),
        }
    return sums


def add(sums: dict[str, float], name: str, value: float, count: float) -> None:
    """Add a value and what it is a mean over."""
    sums[f"{name}/sum"] = sums.get(f"{name}/sum", 0.0) + value
    sums[f"{name}/count"] = sums.get(f"{name}/count", 0.0) + count


def merge(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The gauges of many rows as metrics: means of sums, extremes of extremes; a mean over nothing is 0."""
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name in EXTREMES:
                total[name] = EXTREMES[name](total[name], value) if name in total else value
            else:
                total[name] = total.get(name, 0.0) + value
    means = {
        name[:-4]: total[name] / total[f"{name[:-4]}/count"] if total[f"{name[:-4]}/count"] else 0.0
        for name in total
        if name.endswith("/sum")
    }
    return means | {name: total[name] for name in EXTREMES if name in total}
