"""Copies of weights in bfloat16, made once an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Narrow:
    """The weights of a model in bfloat16, made when they are asked for and the weights have changed.

    An optimizer's step is no change that torch counts: `forget` after it.
    """

    def __init__(self) -> None:
        self.copies: dict[Any, tuple[tuple[int, ...], Any]] = {}

    def stacked(self, *weights: Tensor) -> Tensor:
        """[a, d], [b, d], ... -> [a + b + ..., d] in bfloat16."""
        return self.kept(weights, lambda: torch.cat([weight.detach().to(torch.bfloat16) for weight in weights]))

    def kept(self, weights: Sequence[Tensor], compute: Callable[[], Any], name: str = "") -> Any:
        """What `compute` answers of these weights as they are now."""
        key, now = (name, *(id(weight) for weight in weights)), tuple(x for weight in weights for x in (weight.data_ptr(), weight._version))
        entry = self.copies.get(key)
        if entry is None or entry[0] != now:
            entry = self.copies[key] = now, compute()
        return entry[1]

    def forget(self) -> None:
        """Drop all copies, which an optimizer's step has made stale."""
        self.copies.clear()
