"""How many prompts a step draws, so that about as many sequences are trained whatever was filtered out (arXiv 2509.26628, eq. 10)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ramulus.grow.schedule import State


@dataclass(frozen=True)
class PromptBatch:
    """`first` prompts at first; then as many as should leave `target` trained sequences, approached by a share of `inertia`.

    After a step of B prompts that left v sequences, E = alpha v + (1 - alpha) E (alpha 0: the mean of all so far) and
    B <- beta floor(B target / E) + (1 - beta) B. `rounding`: "ceil", as released, grows by 1 at any shortage and does not shrink
    before the surplus is about 1 / beta prompts; "nearest" as in the paper, without the floor; "none" keeps B as a real number and
    rounds only what is drawn, so that there is no dead band. `least` and `most` bound B (0: no bound).
    A step that left nothing says nothing, and leaves B as it is.

    Example:
        >>> from ramulus import PromptBatch
        >>> PromptBatch(first=64, target=64 * 30).first
        64
    """

    first: int
    target: int
    alpha: float = 1.0
    beta: float = 0.1
    rounding: Literal["ceil", "nearest", "none"] = "ceil"
    least: int = 1
    most: int = 0

    def __post_init__(self) -> None:
        if self.first < 1 or self.target < 1:
            raise ValueError(f"PromptBatch needs first and target of at least 1, got {self.first} and {self.target}")
        if not (0 <= self.alpha <= 1 and 0 < self.beta <= 1):
            raise ValueError(f"PromptBatch needs 0 <= alpha <= 1 and 0 < beta <= 1, got {self.alpha} and {self.beta}")
        if self.rounding not in ("ceil", "nearest", "none"):
            raise ValueError(f"PromptBatch's rounding is 'ceil', 'nearest' or 'none', got {self.rounding!r}")
        if self.least < 1 or (self.most and self.most < self.least):
            raise ValueError(f"PromptBatch needs 1 <= least <= most (most 0: none), got {self.least} and {self.most}")

    def size(self, state: State) -> int:
        """Prompts of the next step."""
        return round(state.get("prompts", self.first))

    def update(self, sequences: int, state: State) -> State:
        """The state after a step that trained on so many sequences: `prompts`, `valid` (E) and `seen`, the steps so far."""
        if sequences < 1:
            return state
        seen = state.get("seen", 0) + 1
        weight = 1 / seen if self.alpha == 0 or seen == 1 else self.alpha
        valid = weight * sequences + (1 - weight) * state.get("valid", 0.0)
        size = state.get("prompts", self.first)
        wanted = size * self.target / valid
        if self.rounding == "ceil":
            # a whole sum can lie a hair above itself in floating point and grow by 1: the released sizes hold such steps
            size = math.ceil(self.beta * math.floor(wanted) + (1 - self.beta) * size)
        else:
            size = self.beta * wanted + (1 - self.beta) * size
            size = math.floor(size + 0.5) if self.rounding == "nearest" else size
        size = max(size, self.least)
        return state | {"prompts": min(size, self.most) if self.most else size, "valid": valid, "seen": seen}
