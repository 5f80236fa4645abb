"""The head of a model in bfloat16 on a CPU: its logits are float32 and exist for some rows at a time; its gradient is two products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ramulus.learn.policy.half_kernels import BFLOAT16, HeadPanels

AT_ONCE, ROWS = 2**23, 12  # float32 logits that exist at once; in whole tiles of rows
PULL_ROWS = 1024  # rows of one product in the backward pass, where nothing was kept
KEPT_PULLS = 2**28  # numbers in bfloat16 that may be kept for the backward pass; above it the logits are computed again there


class Read(torch.autograd.Function):
    """hidden [N, d] in bfloat16 that predict token [N] -> tempered, plain, entropy [N] in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, narrow: Tensor, panels: HeadPanels, scale: float, token: Tensor, by: Tensor | None, hot: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`narrow` is the weight in bfloat16, `by` [N] is one over the temperatures, where some are not 1; `hot` takes the entropy by them."""
        plain = hidden.new_empty(3, len(token), dtype=torch.float32)
        warm = None if by is None else torch.empty_like(plain)
        first = warm if warm is not None else plain
        learns = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        kept = hidden.new_empty(len(token), panels.line) if learns and len(token) * panels.line <= KEPT_PULLS else None
        for part in slices(len(token), logits_at_once(panels)):
            scores = panels.scores(hidden[part], scale)
            for answer, factor in ((plain, None), (warm, by)):
                if answer is not None:
                    for column, read in zip(answer, panels.read(scores, token[part], None if factor is None else factor[part]), strict=True):
                        column[part] = read
            if kept is not None:
                panels.pull(scores, token[part], None if by is None else by[part], first[2][part], None, kept[part])
        ctx.save_for_backward(hidden, narrow, token, by, plain, warm, kept)
        ctx.settings = panels, scale, hot, weight.dtype
        ctx.set_materialize_grads(False)
        return first[0].clone(), plain[0].clone(), (first if hot else plain)[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of hidden and weight: what each answer pulls at is a matrix in bfloat16, times one number a row."""
        hidden, narrow, token, by, plain, warm, kept = ctx.saved_tensors
        panels, scale, hot, dtype = ctx.settings
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(narrow, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        first = (douts[1], None, plain) if by is None else (douts[0], by, warm)
        cases = [(*first, False, kept), (None if by is None else douts[1], None, plain, False, None)]
        cases.append((douts[2], *((by, warm) if hot and by is not None else (None, plain)), True, None))
        for pull, factor, (_, entropy, level), spread, matrix in cases:
            if pull is None:
                continue
            rows = (pull * scale if factor is None else pull * scale * factor)[:, None]
            for part in [slice(0, len(token))] if matrix is not None else slices(len(token), PULL_ROWS):
                if matrix is None:
                    more = None if factor is None else factor[part]
                    dscores = pulled(panels, hidden[part], scale, token[part], more, level[part], entropy[part] if spread else None)
                else:
                    dscores = matrix
                dscores = dscores[:, : panels.words]
                if dhidden is not None:
                    dhidden[part] += (dscores @ narrow[: panels.words]) * rows[part]
                if dweight is not None:
                    dweight[: panels.words] += dscores.t() @ (hidden[part] * rows[part]).to(BFLOAT16)
        return (
            None if dhidden is None else dhidden.to(hidden.dtype), None if dweight is None else dweight.to(dtype), *(None,) * 6,
        )  # fmt: skip


def pulled(
    panels: HeadPanels, hidden: Tensor, scale: float, token: Tensor, by: Tensor | None, level: Tensor, entropy: Tensor | None
) -> Tensor:
    """What `HeadPanels.pull` writes [N, line], from logits that are computed again."""
    matrix = hidden.new_empty(len(token), panels.line)
    for part in slices(len(token), logits_at_once(panels)):
        more = [None if x is None else x[part] for x in (by, entropy)]
        panels.pull(panels.scores(hidden[part], scale), token[part], more[0], level[part], more[1], matrix[part])
    return matrix


def logits_at_once(panels: HeadPanels) -> int:
    """Rows whose float32 logits may exist at once."""
    return max(AT_ONCE // panels.line // ROWS, 1) * ROWS


def slices(rows: int, some: int) -> Iterator[slice]:
    """So many rows at a time."""
    return (slice(at, min(at + some, rows)) for at in range(0, rows, some))
