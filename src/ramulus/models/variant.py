"""The variants of causal attention: windows, chunks, soft caps, sinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sight:
    """Which positions of its own path a token sees, up to its own: all, the last `window`, or those of its own `chunk`.

    Example:
        >>> import torch
        >>> Sight(window=3).first(torch.arange(6)).tolist(), Sight(chunk=4).first(torch.arange(6)).tolist()
        ([0, 0, 0, 1, 2, 3], [0, 0, 0, 0, 4, 4])
    """

    window: int | None = None
    chunk: int | None = None

    def first(self, position: Any) -> Any:
        """The first position seen from each; tensors or arrays of whole numbers."""
        if self.window is not None:
            return (position - (self.window - 1)).clip(min=0)
        return position * 0 if self.chunk is None else position // self.chunk * self.chunk

    def cuts(self, length: int) -> bool:
        """Whether the last token of a path of so many tokens, or one before it, sees less than all."""
        return (self.window or self.chunk or length) < length


FULL = Sight()


@dataclass(frozen=True)
class Variant:
    """What a layer asks beyond softmax(scale x query key) value.

    Example:
        >>> Variant(Sight(window=4096)).plain(100), Variant(softcap=50.0).plain(100)
        (True, False)
    """

    sight: Sight = FULL
    softcap: float | None = None  # scores become softcap x tanh(score / softcap)
    sinks: Tensor | None = None  # [H] one more score a head, of a key without a value

    def plain(self, length: int) -> bool:
        """Whether this is ordinary causal attention on paths of so many tokens."""
        return self.softcap is None and self.sinks is None and not self.sight.cuts(length)


CAUSAL = Variant()


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, variant: Variant) -> Tensor:
    """query [B, H, n, D], key [B, h, K, D], value [B, h, K, E], bias (0 or -inf, to [B, 1, n, K]) -> [B, H, n, E], at least in float32."""
    b, many, n, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(b, key.shape[1], -1, n, query.shape[3])  # query heads beside the key head that they share
    scores = (grouped.to(wide) @ key.to(wide)[:, :, None].transpose(-1, -2)) * scale
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    scores = scores + bias.to(wide)[:, :, None]
    if variant.sinks is not None:
        sinks = variant.sinks.to(wide).view(1, key.shape[1], -1, 1, 1).expand(b, -1, -1, n, 1)
        weight = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        weight = scores.softmax(-1)
    return (weight @ value.to(wide)[:, :, None]).reshape(b, many, n, -1).to(query.dtype)


def sight_of(rule: Callable[..., Any], size: int | None) -> Sight | None:
    """What transformers' mask function (batch, head, query, key -> bool) lets tokens see, `size` being its window or chunk; None for any other mask.

    It is asked at positions around the edges, also far ones, so nothing is read from its name.
    """
    edge = size or 64
    far = 7 * edge + 3
    corners = {0, 1, 5, edge - 1, edge, edge + 1, 2 * edge - 1, 2 * edge, 2 * edge + 1, far, far + edge // 2}
    query = torch.tensor(sorted(x for x in corners if x >= 0))
    key = torch.cat([query, (query[:, None] + torch.tensor([-edge - 1, -edge, -edge + 1, -1, 1])).flatten()]).unique()
    key = key[key >= 0]
    zero = torch.zeros(1, 1, dtype=torch.long)
    try:
        allowed = rule(zero, zero, query[:, None], key[None])
    except (IndexError, RuntimeError, TypeError, ValueError):  # it looks things up that are not there for positions beyond the text
        return None
    for sight in (FULL, *([Sight(window=size), Sight(chunk=size)] if size else [])):
        expected = (key[None] <= query[:, None]) & (key[None] >= sight.first(query)[:, None])
        if torch.equal(expected, torch.as_tensor(allowed).expand(expected.shape)):
            return sight
    return None
