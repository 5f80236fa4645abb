"""Half-precision models computed in float32, so that a check of what is computed is not one of how it is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)


def is_half(model: nn.Module) -> bool:
    """Whether all parameters are of floating point and some in half precision; not so for quantised ones."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    return bool(kinds & set(HALVES)) and all(kind.is_floating_point and kind.itemsize > 1 for kind in kinds)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside, a half-precision model computes in float32 with the weights that it has; others are left alone.

    The weights of one block of layers are widened at a time, for the length of its forward, and put back: no copy of the model is made.
    """
    if not is_half(model):
        yield
        return
    handles = []
    try:
        for part in widened_parts(model):
            widen = Widen(part)
            handles.append(part.register_forward_pre_hook(widen.enter, prepend=True))
            handles.append(part.register_forward_hook(widen.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def widened_parts(model: nn.Module) -> list[nn.Module]:
    """Modules to widen whole: the blocks of the outermost lists, and whatever holds weights outside them."""
    parts: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        blocks = isinstance(module, nn.ModuleList)
        for child in module.children():
            parts.append(child) if blocks else walk(child)
        if not blocks and any(True for _ in module.parameters(recurse=False)):
            parts.append(module)

    walk(model)
    return parts


class Widen:
    """The hooks of one part."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self.kept: list[list[tuple[Any, torch.Tensor]]] = []  # of each entry, what was widened

    def enter(self, *unused: Any) -> None:
        """Widen what is not wide yet."""
        narrow = [x for x in (*self.part.parameters(), *self.part.buffers()) if x.dtype in HALVES]
        self.kept.append([(x, x.data) for x in narrow])
        for x in narrow:
            x.data = x.data.float()

    def leave(self, *unused: Any) -> None:
        """Put back what was there."""
        for x, data in self.kept.pop() if self.kept else ():
            x.data = data
