"""What lies between the products of a layer and of the head in bfloat16, by compiled kernels on a CPU (native/layers.c)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramulus.native.build import Unavailable, library

BFLOAT16 = torch.bfloat16
WHOLE, ADDRESS, REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_KERNELS = {
    "ramulus_norm": (None, (*(WHOLE,) * 4, REAL, *(ADDRESS,) * 4)),
    "ramulus_norm_backward": (None, (*(WHOLE,) * 4, *(ADDRESS,) * 6)),
    "ramulus_gated": (None, (*(WHOLE,) * 3, *(ADDRESS,) * 2)),
    "ramulus_gated_backward": (None, (*(WHOLE,) * 3, *(ADDRESS,) * 4)),
    "ramulus_rotate": (None, (*(WHOLE,) * 6, *(ADDRESS,) * 3)),
    "ramulus_head_scores": (None, (ADDRESS, REAL, ADDRESS, WHOLE)),
    "ramulus_head_read": (None, (*(WHOLE,) * 4, *(ADDRESS,) * 6)),
    "ramulus_head_pull": (None, (*(WHOLE,) * 4, *(ADDRESS,) * 6)),
    "ramulus_panel": (WHOLE, ()),
}
HALF_FLAGS: tuple[str, ...] = ()  # of the compiler
WHOLE_VECTORS = 16  # numbers in the widest vectors: widths are multiples of it


def half_library() -> Any:
    """The library; None where there is none."""
    try:
        return library("layers.c", _KERNELS, *HALF_FLAGS)
    except Unavailable:
        return None


def call(name: str, *arguments: Any) -> None:
    """Call a kernel: tensors, that lie together, by where they begin."""
    getattr(half_library(), name)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., d] in float32 or bfloat16, weight [d] -> weight x / rms(x) in bfloat16, and 1 / rms(x) [N] in float32."""
    x, width = x.contiguous(), x.shape[-1]
    rows = x.numel() // width
    out, inverse = torch.empty_like(x, dtype=BFLOAT16), x.new_empty(rows, dtype=torch.float32)
    call("ramulus_norm", rows, width, int(x.dtype != BFLOAT16), torch.get_num_threads(), eps, x, weight.float(), out, inverse)
    return out, inverse


def norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, as x is, and of the weight in float32."""
    x, width, threads = x.contiguous(), x.shape[-1], torch.get_num_threads()
    dx, dweight = torch.empty_like(x), inverse.new_zeros(threads, width)
    wide = int(x.dtype != BFLOAT16)
    call("ramulus_norm_backward", len(inverse), width, wide, threads, x, weight.float(), inverse, dout.contiguous(), dx, dweight)
    return dx, dweight.sum(0)


def gated_forward(both: Tensor) -> Tensor:
    """Gate beside up [N, 2 I] -> silu(gate) up [N, I]."""
    out = both.new_empty(len(both), both.shape[1] // 2)
    call("ramulus_gated", *out.shape, torch.get_num_threads(), both, out)
    return out


def gated_backward(both: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """What `gated_forward` answers, and from its gradient [N, I] that of both [N, 2 I]."""
    out, dboth = torch.empty_like(dout), torch.empty_like(both)
    call("ramulus_gated_backward", *out.shape, torch.get_num_threads(), both, dout, out, dboth)
    return out, dboth


def rotate(x: Tensor, heads: int, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """The first heads of x [T, H, D] turned by the angles of their positions, cos and sin [T, D] in float32, in place; or turned back."""
    call("ramulus_rotate", len(x), heads, *x.shape[1:], int(back), torch.get_num_threads(), cos, sin, x)
    return x


@dataclass(frozen=True)
class HeadPanels:
    """The weights of a head as its kernels read them."""

    panels: Tensor  # [padded words / P, width / 2, P, 2] bfloat16
    words: int  # that are drawn
    width: int

    @classmethod
    def of(cls, weight: Tensor, words: int) -> HeadPanels:
        """The panels of the first `words` rows of a weight [V, d] in bfloat16."""
        panel = int(half_library().ramulus_panel())
        padded = torch.nn.functional.pad(weight[:words], (0, 0, 0, -words % panel))
        width = weight.shape[1]
        return cls(padded.view(-1, panel, width // 2, 2).transpose(1, 2).contiguous(), words, width)

    @property
    def line(self) -> int:
        """Numbers in a row of scores."""
        return int(self.panels.shape[0] * self.panels.shape[2])

    def scores(self, hidden: Tensor, scale: float) -> Tensor:
        """hidden [N, d] in bfloat16 -> [N, line] in float32, -inf beyond the words."""
        scores = torch.empty(len(hidden), self.line)
        words = len(hidden), self.width, self.words, torch.get_num_threads(), hidden.data_ptr(), self.panels.data_ptr()
        arguments = np.array(words, dtype=np.uint64)
        call("ramulus_head_scores", arguments.ctypes.data, scale, scores, self.line)
        return scores

    def read(self, scores: Tensor, token: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-prob of each token, entropy and level [N] of the scores [N, line] times `by`."""
        answer = torch.empty(3, len(scores))
        call("ramulus_head_read", *self._sizes(scores), scores, token, 0 if by is None else by, *answer)
        return answer[0], answer[1], answer[2]

    def pull(self, scores: Tensor, token: Tensor, by: Tensor | None, level: Tensor, entropy: Tensor | None, out: Tensor) -> None:
        """Write how the log-probs, or with `entropy` the entropies, change with the scores times `by` [N, line], in bfloat16."""
        call("ramulus_head_pull", *self._sizes(scores), scores, token, 0 if by is None else by, level, 0 if entropy is None else entropy, out)

    def _sizes(self, scores: Tensor) -> Sequence[int]:
        return len(scores), self.words, self.line, torch.get_num_threads()
