"""One of several rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ramulus.core.task import Reward


@dataclass(frozen=True)
class Weighted:
    """One reward among several: its weight in the total, and the name of its part in a leaf's verdict.

    Example:
        >>> from ramulus import ExactAnswer, Overlong, Weighted
        >>> [part.weight for part in (Weighted(ExactAnswer()), Weighted(Overlong(512, 128), 0.5))]
        [1.0, 0.5]
    """

    reward: Reward
    weight: float = 1.0
    name: str = ""  # "" takes the class name of the reward, in lower case

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of a reward must be a finite number, got {self.weight}")
