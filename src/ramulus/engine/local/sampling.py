"""Logits to tokens: tempered, truncated, drawn by inverse CDF with one uniform number each, and recorded exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ramulus.engine.engine import Sampling, Temperature, entropy_rule, rule_features

CHUNK = 512  # of the two-level inverse CDF
FLAT = 2048  # vocabularies up to this size are summed in one level
CANDIDATES = 1024  # first guess of how many tokens truncation can leave
EVERY = 2**62  # top-k that cuts nothing


@dataclass(frozen=True)
class Drawn:
    """One token for each of B rows, as lists [B]."""

    tokens: list[int]
    logprobs: list[float]  # of the tempered and truncated distribution
    kept: list[float]  # log of the mass that truncation left, 0 where nothing was cut
    entropy: list[float]  # nats, untempered
    temperature: list[float]


class SamplingBatch:
    """The sampling settings of B rows as columns; made anew only when the rows change."""

    def __init__(self, samplings: list[Sampling], device: torch.device, dtype: torch.dtype) -> None:
        fixed = [1.0 if callable(s.temperature) else float(s.temperature) for s in samplings]
        groups: dict[int, tuple[Temperature, list[int]]] = {}
        for i, s in enumerate(samplings):
            if callable(s.temperature):
                groups.setdefault(id(s.temperature), (s.temperature, []))[1].append(i)
        whole = len(groups) == 1 and all(callable(s.temperature) for s in samplings)
        self.rules: list[tuple[Any, Tensor | None]] = [
            (rule, None if whole else torch.tensor(rows, device=device)) for rule, rows in groups.values()
        ]
        temperature = torch.tensor(fixed, dtype=dtype)
        held = temperature.tolist()  # rounded: what logits are divided by may be 0 or 1 where the number is not quite
        self.temperature = temperature.to(device)  # [B], 1 where a rule decides
        self.fixed = fixed
        self.plain = not groups and all(t == 1 for t in held)
        self.greedy = not groups and all(t == 0 for t in held)
        self.some_greedy = any("positive" not in rule_features(rule) for rule, _ in self.rules) or any(t == 0 for t in held)
        cut = [i for i, s in enumerate(samplings) if s.truncates]
        self.cut = torch.tensor(cut, device=device) if cut else None  # [R] rows that are truncated
        chosen = [samplings[i] for i in cut]
        self.top_k = torch.tensor([s.top_k if s.top_k > 0 else EVERY for s in chosen], device=device)  # [R]
        self.top_p = torch.tensor([s.top_p for s in chosen], device=device, dtype=torch.float64)  # [R]
        self.min_p = torch.tensor([s.min_p for s in chosen], device=device, dtype=dtype)  # [R]

    def temperatures(self, logits: Tensor, entropy: Tensor) -> Tensor:
        """logits [B, V] and their entropy [B] -> [B]; raises ValueError where a rule answers with the wrong shape."""
        out = self.temperature
        known = bool((entropy == entropy).all())  # NaN where some logits are -inf
        for rule, rows in self.rules:
            mine = logits if rows is None else logits[rows]
            if known and (by_entropy := entropy_rule(rule)) is not None:
                answer = by_entropy.of_entropy(entropy if rows is None else entropy[rows])
            else:
                answer = rule(mine)
            value = torch.as_tensor(answer, device=logits.device).to(out.dtype)
            if value.shape != mine.shape[:1]:
                raise ValueError(f"temperature rule {rule} gave shape {tuple(value.shape)}, it must map logits [B, V] to [{len(mine)}]")
            out = value if rows is None else out.index_copy(0, rows, value)
        return out


class Quick(Protocol):
    """Compiled kernels for rows without truncation, in float32."""

    def entropy(self, logits: Tensor) -> Tensor:
        """[B, V] -> [B] nats; NaN where a logit is."""
        ...

    def draw(
        self, logits: Tensor, temperature: Tensor, uniform: Tensor, entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probs and entropies [B]."""
        ...


@torch.inference_mode()
def draw(logits: Tensor, sampling: SamplingBatch, uniform: Tensor, quick: Quick | None = None) -> Drawn:
    """Draw one token a row: logits [B, V] in float32 or float64, uniform [B] float64 in [0, 1). `quick` draws where it can.

    Truncation is top-k first, then top-p of what top-k left, then min-p relative to the most probable token, all on the tempered
    distribution. Temperature 0 takes the most probable token (log-prob 0, kept 0). A token of probability 0 is never drawn.
    Raises ValueError for logits that are NaN or +inf, for a row of -inf alone, and for temperatures that are not finite and >= 0.
    """
    if quick is not None and sampling.cut is None:
        drawn = _quickly(logits, sampling, uniform, quick)
        if drawn is not None:
            return drawn
    plain = logits.log_softmax(-1)
    p = plain.exp()
    entropy = -(p * plain).sum(-1)
    temperature, logp = sampling.temperature, plain
    if not sampling.plain and not sampling.greedy:
        temperature = sampling.temperatures(logits, entropy)
        divisor = torch.where(temperature == 0, 1.0, temperature) if sampling.some_greedy else temperature
        logp = ((logits - logits.amax(-1, keepdim=True)) / divisor[:, None]).log_softmax(-1)  # the difference first: no overflow
        p = logp.exp()
    kept: Tensor | None = None
    if sampling.greedy:
        tokens = logits.argmax(-1)
        chosen = torch.zeros_like(entropy)
    else:
        tokens = inverse_cdf(p, uniform)
        chosen = logp.gather(1, tokens[:, None])[:, 0]
        if sampling.cut is not None:
            kept = torch.zeros_like(chosen)
            tokens, chosen, kept = _truncated(p, logp, sampling, uniform, tokens, chosen, kept)
        if sampling.some_greedy:
            cold = temperature == 0
            tokens = torch.where(cold, logits.argmax(-1), tokens)
            chosen = chosen.masked_fill(cold, 0.0)
            kept = None if kept is None else kept.masked_fill(cold, 0.0)
    return _recorded(logits, plain, sampling, tokens, chosen, kept, entropy, temperature)


def _quickly(logits: Tensor, sampling: SamplingBatch, uniform: Tensor, quick: Quick) -> Drawn | None:
    """What the kernels draw; None where a logit is NaN or +inf, or all are -inf, which is looked into by `draw`."""
    temperature, entropy = sampling.temperature, None
    if sampling.rules:
        entropy = quick.entropy(logits)
        if not bool((entropy == entropy).all()):
            return None
        temperature = sampling.temperatures(logits, entropy)
    tokens, chosen, entropy = quick.draw(logits, temperature, uniform, entropy)
    nats = entropy.tolist()
    if any(x != x for x in nats):
        return None
    temperatures = checked(temperature.tolist(), sampling) if sampling.rules else sampling.fixed
    return Drawn(tokens.tolist(), chosen.tolist(), [0.0] * len(temperatures), nats, temperatures)


def checked(temperatures: list[float], sampling: SamplingBatch) -> list[float]:
    """The temperatures that rules gave; ValueError where one is not finite and >= 0."""
    for rule, _ in sampling.rules:
        wrong = [t for t in temperatures if not 0 <= t < math.inf]
        if wrong:
            raise ValueError(f"a temperature rule gave {wrong[0]} (rules: {rule}): it must be finite and >= 0")
    return temperatures


def _recorded(
    logits: Tensor, plain: Tensor, sampling: SamplingBatch, tokens: Tensor, chosen: Tensor, kept: Tensor | None, entropy: Tensor, temperature: Tensor
) -> Drawn:
    """The columns as lists, in one transfer from the device, and checked."""
    columns = [tokens, chosen, entropy]
    if kept is not None:
        columns.append(kept)
    if sampling.rules:
        columns.append(temperature)
    lists = torch.stack([column.double() for column in columns]).tolist()
    if any(x != x for x in lists[2]):  # NaN: either the model is broken or some logits are -inf
        if not bool(logits.amax(-1).isfinite().all()):
            raise ValueError("the model's logits are NaN or infinite: look for a diverged update or an overflow in its dtype")
        lists[2] = torch.where(plain.isinf(), 0.0, -plain.exp() * plain).sum(-1).tolist()
    temperatures = checked(lists[-1], sampling) if sampling.rules else sampling.fixed
    if math.isnan(sum(lists[1])) and (wrong := [t for t, x in zip(temperatures, lists[1], strict=True) if x != x]):
        raise ValueError(f"a token's log-prob is NaN at temperature {wrong[0]}: let a rule that is 'positive' answer 1e-30 at least")
    mass = lists[3] if kept is not None else [0.0] * len(temperatures)
    return Drawn([int(t) for t in lists[0]], lists[1], mass, lists[2], temperatures)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index drawn in proportion to weights [B, N] (>= 0, not normalised) with uniform [B] -> long [B].

    The first index whose cumulated weight passes uniform x total, summed in float64; above FLAT columns first over chunks, then
    inside the chunk found, so that the cost is two short scans and the precision does not fall with N.
    """
    n = weights.shape[1]
    if n <= FLAT:
        return _search(weights.cumsum(-1, dtype=torch.float64), uniform)[0]
    whole = n // CHUNK
    sums = weights[:, : whole * CHUNK].unflatten(1, (whole, CHUNK)).sum(-1, dtype=torch.float64)
    if n % CHUNK:
        sums = torch.cat((sums, weights[:, whole * CHUNK :].sum(-1, keepdim=True, dtype=torch.float64)), 1)
    totals = sums.cumsum(-1)
    chunk, target = _search(totals, uniform)
    before = totals.gather(1, chunk[:, None]) - sums.gather(1, chunk[:, None])
    columns = chunk[:, None] * CHUNK + torch.arange(CHUNK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=n - 1)).double().masked_fill(columns >= n, 0.0).cumsum(-1)
    inner, _ = _search(inside, (target - before[:, 0]).clamp(min=0), scaled=True)
    return (chunk * CHUNK + inner).clamp(max=n - 1)  # the last chunk may be short: clamped, as in `_search`, for NaN alone


def _search(totals: Tensor, target: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor]:
    """First column of the running totals [B, N] above the target [B]: its index and the target, both [B]."""
    last = totals[:, -1]
    target = torch.minimum(target if scaled else target * last, torch.nextafter(last, torch.zeros_like(last)))  # always below the total
    index = torch.searchsorted(totals, target[:, None], right=True)[:, 0]
    return index.clamp(max=totals.shape[1] - 1), target  # clamped for NaN alone, which is reported later


def _truncated(
    p: Tensor, logp: Tensor, sampling: SamplingBatch, uniform: Tensor, tokens: Tensor, chosen: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Redraw the rows that have top-k, top-p or min-p: the three columns [B] with those rows replaced."""
    rows = sampling.cut
    assert rows is not None
    p, order = _ranked(p[rows], sampling)
    whole = sampling.top_k >= logp.shape[1]  # top-k cuts nothing
    left = p >= sampling.min_p[:, None] * p[:, :1]
    inside = torch.arange(p.shape[1], device=p.device) < sampling.top_k[:, None]
    sums = (p * inside).cumsum(-1, dtype=torch.float64)
    before = torch.nn.functional.pad(sums[:, :-1], (1, 0))
    mass = torch.where(whole, 1.0, sums[:, -1])  # what top-k left
    left &= inside & ((before < (sampling.top_p * mass)[:, None]) | (sampling.top_p == 1)[:, None])
    weights = p * left
    token = order.gather(1, inverse_cdf(weights, uniform[rows])[:, None])
    full = left.all(-1) & (p.shape[1] == logp.shape[1])
    log_mass = weights.sum(-1, dtype=torch.float64).log().clamp(max=0.0).masked_fill(full, 0.0).to(chosen.dtype)
    value = logp[rows].gather(1, token)[:, 0] - log_mass
    token = token[:, 0]
    return tokens.index_copy(0, rows, token), chosen.index_copy(0, rows, value), kept.index_copy(0, rows, log_mass)


def _ranked(p: Tensor, sampling: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Probabilities [R, V] in falling order, ties by id, and their ids [R, <= V].

    First only the CANDIDATES most probable; a row is settled when its truncation ends among those strictly above the last of them, so that
    neither the neighbours nor the order of ties can change what it draws; a share of what a top-k beyond them leaves is not known by them.
    Otherwise all are sorted.
    """
    if p.shape[1] > CANDIDATES:
        top, order = p.topk(CANDIDATES, dim=-1)
        above = top > top[:, -1:]
        mass = (top * above).sum(-1, dtype=torch.float64)
        settled = ((sampling.top_p < 1) & (mass >= sampling.top_p)) | (top[:, -1] < sampling.min_p * top[:, 0])
        settled &= (sampling.top_k <= CANDIDATES) | (sampling.top_k >= p.shape[1]) | (sampling.top_p == 1)
        settled |= above.sum(-1) >= sampling.top_k
        if bool(settled.all()):
            order = order.sort(dim=-1).values
            top, places = p.gather(1, order).sort(dim=-1, descending=True, stable=True)
            return top, order.gather(1, places)
    return p.sort(dim=-1, descending=True, stable=True)
