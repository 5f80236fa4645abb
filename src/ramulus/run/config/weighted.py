"""One of several rewards."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ramulus.core.task import Reward
from ramulus.run.config.describe import to_json
from ramulus.run.config.own_code import code_digests


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


REWARD_CODE = "code of the rewards"  # a setting of an evaluation: their digest


def named_rewards(rewards: Any) -> tuple[tuple[Reward, float, str], ...]:
    """(reward, weight, name) of one reward or of several, as `grow.grade` takes them. Raises ValueError where two have the same name."""
    parts = [part if isinstance(part, Weighted) else Weighted(part) for part in (rewards if isinstance(rewards, tuple) else (rewards,))]
    named = tuple((part.reward, part.weight, part.name or getattr(part.reward, "__name__", type(part.reward).__name__).lower()) for part in parts)
    names = [name for _, _, name in named]
    if len(set(names)) < len(names):
        raise ValueError(f"two rewards have the same name in {names}: name them, Weighted(reward, weight, name)")
    return named


def reward_digest(rewards: tuple[tuple[Reward, float, str], ...]) -> str:
    """A digest of what rewards are: their settings, and the code of those that are not ramulus' own."""
    described = [[name, weight, _settings(reward), *([code] if (code := code_digests(reward)) else [])] for reward, weight, name in rewards]
    return blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def _settings(reward: Any) -> Any:
    """Its fields, or its name where it is nothing that can be written down."""
    try:
        return to_json(reward)
    except ValueError:
        return type(reward).__qualname__
