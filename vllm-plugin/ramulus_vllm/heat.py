"""Temperatures that depend on the token, as a logits processor of both of vLLM's interfaces; a request asks by its `extra_args`.

`{"ramulus_temperature": {"rule": "ByEntropy", "fields": {...}}}`, where the fields are those of `ramulus.ByEntropy` (arXiv 2509.16591), and the
request's own temperature is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as OnBatch
from vllm.v1.sample.logits_processor import process_dict_updates

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as OnSlots
except ImportError:  # before the second interface

    class OnSlots:  # type: ignore[no-redef]
        """Stands in."""


KEY = "ramulus_temperature"
SMALLEST = 1e-6  # nats; entropies below it count as it


@dataclass(frozen=True)
class ByEntropy:
    """The rule of the same name in ramulus: the same fields, the same numbers."""

    base: float = 1.0
    tau: float = 0.1
    pivot: float = 0.8
    kind: str = "zscore"
    limit: float = 5.0
    stats: tuple[float, float, float, float] | None = None  # pivot, rms, above, below

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> temperatures [B]."""
        if self.stats is None:
            return logits.new_full(logits.shape[:1], self.base)
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
        pivot, rms, above, below = self.stats
        apart = (entropy.clamp(min=SMALLEST).log() - pivot) / (rms + 1e-6)
        if self.kind == "zscore":
            return self.base * (1 + self.tau * apart.clamp(-self.limit, self.limit))
        h = (apart.clamp(min=0) * above + apart.clamp(max=0) * below).clamp(-1, 1)
        return self.base * (1 + self.tau * (h.abs() if self.kind == "released" else h))


def rule_of(sampling: Any) -> ByEntropy | None:
    """What a request asks for; ValueError for a rule that is not known here."""
    asked = (sampling.extra_args or {}).get(KEY)
    if asked is None:
        return None
    try:
        name, fields = asked["rule"], dict(asked["fields"])
        if name != "ByEntropy":
            raise ValueError(f"this server does not know the temperature rule {name!r}: it knows ByEntropy")
        stats = fields.pop("stats", None)
        values = tuple(float(stats[part]) for part in ("pivot", "rms", "above", "below")) if stats is not None else None
        return ByEntropy(**fields, stats=values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no temperature rule ({type(error).__name__}: {error}): install the same ramulus on both sides") from None


def heat(logits: Tensor, rules: dict[int, ByEntropy]) -> Tensor:
    """Divide rows of logits [B, V], in place, by the temperatures of their rules; rows without one stay."""
    for rule in set(rules.values()):
        rows = [row for row, other in rules.items() if other == rule]
        if len(rows) == len(logits):
            return logits.div_(rule(logits)[:, None])
        index = torch.tensor(rows, device=logits.device)
        some = logits[index]
        logits[index] = some / rule(some)[:, None]
    return logits


class Heat(OnBatch, OnSlots):
    """By rows of the batch, as Model Runner V1 asks, or by slots of requests, as V2 does: which one is seen by what it is made with."""

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool | None = None) -> None:
        self.rules: dict[int, ByEntropy] = {}  # by row of the batch (V1), by slot (V2)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what is not known, when a request comes in."""
        rule_of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """V1: a temperature changes no order, and is applied before top-k and top-p."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """V1: rows come, move and go."""
        process_dict_updates(self.rules, batch_update, lambda sampling, _prompt, _output: rule_of(sampling))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a slot is taken."""
        rule = rule_of(sampling_params)
        self.rules.pop(req_idx, None)
        if rule is not None:
            self.rules[req_idx] = rule
        return rule is not None

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Both: logits [B, V] divided by the temperatures of their rows."""
        if not self.rules:
            return logits
        if ctx is None:
            return heat(logits, self.rules)
        slots = ctx.expanded_idx_mapping.tolist()
        return heat(logits, {row: self.rules[slot] for row, slot in enumerate(slots) if slot in self.rules})
