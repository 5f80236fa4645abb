"""Gauges: what the maths did, recomputed beside it from log-probs and a batch; nothing here is differentiated."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ramulus.core.recipe_part import with_defaults
from ramulus.core.tree import Author
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.leaf_weight import Leaf, fold
from ramulus.learn.objective.mask import Behind, Mask
from ramulus.learn.objective.mix import Mix
from ramulus.learn.objective.reference import Reference

BEYOND = 0.1  # nats between sampler and learner beyond which a token counts in `mismatch_share`
EXTREMES = {"ratio_max": max, "ratio_min": min, "mismatch_max": max}


@torch.no_grad()
def surrogate(
    mix: Mix, tempered: Tensor, plain: Tensor, entropy: Tensor, batch: TreeBatch, values: Tensor | None = None
) -> float | None:
    """The textbook loss of this row, for example PPO's -sum min(r A, clip(r) A); rows add up.

    None where a mask does not say its `clamp` or a reference its `potential`. The regression of a value head counts where its `values` [T] are given.
    """
    total = mix.extras(tempered if mix.kl.tempered else plain, entropy, batch, values)
    for m, term in enumerate(mix.terms):
        logp = tempered if term.estimator.tempered else plain
        earned = objective(term.estimator, logp, entropy, mix.term(batch, m))
        if earned is None:
            return None
        total = total - term.coefficient * earned
    return float(total)


def objective(rule: Estimator, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor | None:
    """What the textbook loss of one term is the negative of, on the term's batch; None where it is not known.

    Where a path has one ratio, each of its tokens holds it, times the factor of the mask there (GSPO-token, arXiv 2507.18071, section 4.3).
    """
    leaf, mask = with_defaults(rule.leaf, Leaf), with_defaults(rule.mask, Mask)
    up, down = (leaf.potential(sign, logp, entropy, batch) for sign in (1, -1))
    if up is not None and down is not None:
        if any(mask.clamp(sign, logp, entropy, batch) is None for sign in (1, -1)):
            return None
        credit = batch.leaf_weight * batch.leaf_credit
        gain, pain = fold(credit.clamp(min=0) * up, batch), fold(credit.clamp(max=0) * down, batch)
        return (gain * mask.factor(1, logp, entropy, batch) + pain * mask.factor(-1, logp, entropy, batch)).sum()
    gain, pain = rule.pulls(logp, entropy, batch)
    up, down = (value(rule, sign, logp, entropy, batch) for sign in (1, -1))
    return None if up is None or down is None else (gain * up + pain * down).sum()


def value(rule: Estimator, sign: int, logp: Tensor, entropy: Tensor, batch: TreeBatch) -> Tensor | None:
    """What the textbook loss multiplies credit of one sign by, [T]; None where it is not known."""
    mask, reference = with_defaults(rule.mask, Mask), with_defaults(rule.reference, Reference)
    moved = mask.clamp(sign, logp, entropy, batch)
    potential = None if moved is None else reference.potential(moved, batch)
    return None if potential is None else potential * mask.factor(sign, logp, entropy, batch)


@torch.no_grad()
def gauges(
    mix: Mix,
    tempered: Tensor,
    plain: Tensor,
    entropy: Tensor,
    batch: TreeBatch,
    version: int | None = None,
    values: Tensor | None = None,
) -> dict[str, float]:
    """Sums over this row for `merge`; a shared token counts once per trained leaf below it.

    `mismatch`, the mean of |log pi - log mu|, `mismatch_kl`, `mismatch_share` and `mismatch_max` are over the tokens that `version` of the policy
    sampled; None takes all. With the `values` [T] of a head, what `merge` needs
    for `explained_variance`.

    Clip fractions are shares of credit: of the positive credit how much lies above the clip, of the negative how much below it.
    Leaves without credit may not be packed: `weights.idle_entropy` gives their part of `entropy`, as they were sampled; `kl_sampler`, the ratios
    and `mismatch_max` leave them out.
    """
    sums: dict[str, float] = {}
    clipped(sums, mix, tempered, plain, entropy, batch)
    if values is not None and batch.target is not None:
        moments(sums, values, batch)
    leaves = batch.leaves.amax(0)
    add(sums, "entropy", float((leaves * entropy).sum()), float(leaves.sum()))
    sampled = batch.sampled & (leaves > 0) & (batch.author == int(Author.POLICY)) & (batch.temperature > 0)
    if bool(sampled.any()):
        weight, apart = leaves[sampled], (tempered - batch.behavior)[sampled].clamp(-20, 20)
        add(sums, "kl_sampler", float((weight * (apart.exp() - apart - 1)).sum()), float(weight.sum()))
        ratio = apart.exp()
        sums |= {
            "ratio_max": float(ratio.max()),
            "ratio_min": float(ratio.min()),
        }
        here = torch.ones_like(apart, dtype=torch.bool) if version is None or batch.version is None else batch.version[sampled] == version
        mismatch(sums, apart[here], weight[here])
    return sums


def mismatch(sums: dict[str, float], apart: Tensor, weight: Tensor) -> None:
    """Add how far sampler and learner are apart on tokens [N] that the same weights sampled: log pi - log mu, and how often each counts."""
    size, total = apart.abs(), float(weight.sum())
    sums["mismatch_max"] = float(size.max()) if len(size) else 0.0
    add(sums, "mismatch", float((weight * size).sum()), total)
    add(sums, "mismatch_kl", float((weight * (apart.exp() - apart - 1)).sum()), total)
    add(sums, "mismatch_share", float((weight * (size > BEYOND)).sum()), total)


def clipped(
    sums: dict[str, float], mix: Mix, tempered: Tensor, plain: Tensor, entropy: Tensor, batch: TreeBatch
) -> None:
    """Add the shares of credit that lie beyond the clips, over all terms."""
    for m, term in enumerate(mix.terms):
        part, rule = mix.term(batch, m), term.estimator
        if isinstance(rule.mask, Behind):  # a pull that rests, not a clip that acts
            continue
        logp = tempered if rule.tempered else plain
        for name, sign, credit in (("clip_high", 1, part.gain), ("clip_low", -1, -part.pain)):
            factor = with_defaults(rule.mask, Mask).factor(sign, logp, entropy, part)
            cut = credit * (rule.mask(sign, logp, entropy, part) == 0) * (factor != 0)  # what a factor takes away is not clipped
            if rule.leaf is not None:
                outside = rule.leaf(sign, logp, entropy, part) == 0
                below = part.leaf_weight * (sign * part.leaf_credit).clamp(min=0) * outside
                cut = torch.maximum(cut, fold(below, part))
            add(sums, name, float(cut.sum()), float(credit.sum()))


@torch.no_grad()
def counts(batch: TreeBatch) -> dict[str, int]:
    """Tokens of a row: `packed`, and `flattened` if every path stood alone, both with prompts; `trained` by some term, and of those with
    `zero_credit` from every term."""
    trained = batch.leaves.amax(0) > 0
    silent = trained & (batch.gain == 0).all(0) & (batch.pain == 0).all(0)
    flattened = batch.position[batch.leaf_token].sum() + len(batch.leaf_token)
    sums = torch.stack((trained.sum(), silent.sum(), flattened)).tolist()  # one wait for the device, not three
    return {"packed": len(batch)} | dict(zip(("trained", "zero_credit", "flattened"), sums, strict=True))


def moments(sums: dict[str, float], values: Tensor, batch: TreeBatch) -> None:
    """Add the first two moments of the targets and of what values [T] leave of them, over flattened paths."""
    assert batch.target is not None
    assert batch.target_weight is not None
    assert batch.target_spread is not None
    total, left = float(batch.target_weight.sum()), batch.target - values
    for name, column in (("target", batch.target), ("left", left)):
        add(sums, f"value/{name}", float((batch.target_weight * column).sum()), total)
        add(sums, f"value/{name}_square", float((batch.target_weight * (column**2 + batch.target_spread)).sum()), total)


def explained(means: dict[str, float]) -> dict[str, float]:
    """`explained_variance`: 1 - Var(target - value) / Var(target), 1 for a perfect head, 0 for a constant one; nothing where targets do not vary."""
    moments = {name: means.pop(f"value/{name}", 0.0) for name in ("target", "target_square", "left", "left_square")}
    spread = moments["target_square"] - moments["target"] ** 2
    unexplained = moments["left_square"] - moments["left"] ** 2
    return {"explained_variance": 1 - unexplained / spread} if spread > 1e-12 else {}


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
    explained_share = explained(means)
    return means | explained_share | {name: total[name] for name in EXTREMES if name in total}
