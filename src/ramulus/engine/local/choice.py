"""Which forward pass an engine takes, and what it says of that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ramulus.engine.local.check import verify_forward
from ramulus.engine.local.compiled import CompiledForward, misfit
from ramulus.engine.local.forward import Forward, ModelForward
from ramulus.engine.local.fused import FusedForward, recognise
from ramulus.engine.local.precision import sampled_in
from ramulus.models.precision import HALVES
from ramulus.models.survey import message_of
from ramulus.native.memory import GB

F = TypeVar("F", bound=FusedForward)
WAYS = {"compiled": "compiled kernels", "fused": "torch's operations", "transformers": "the model's own modules"}  # by the name of the forward


@dataclass(frozen=True)
class Choice:
    """A forward pass, the model's own that it was checked against, and why it is no faster one; `copy` of the model in another precision, if any."""

    forward: Forward
    reference: ModelForward
    because: str = ""
    copy: nn.Module | None = None

    @property
    def about(self) -> str:
        """In a line for a person."""
        g, way = self.forward.geometry, WAYS[self.forward.name]
        precision = str(g.dtype).removeprefix("torch.")
        if isinstance(self.forward, CompiledForward):
            return f"{way} in {precision}, which read a copy of the weights of {self.forward.nbytes / GB:.2f} GB"
        return f"{way} in {precision} on {g.device}: {self.because}"


def choose(model: nn.Module, precision: torch.dtype | None, fast: bool, native: bool, native_limit: int | None, memory: int) -> Choice:
    """The fastest forward that the self-check agrees with: compiled, fused, the model's own. Raises ValueError where not even that does.

    The kernels take other precisions from the model itself; the other ways need a copy of it.
    """
    reference = ModelForward(model)
    verify_forward(reference, reference)
    own = reference.geometry.dtype
    fused = _fused(reference) if fast else "fast=False asks for it"
    because, twin = "native=False asks for it", None
    if native and not isinstance(fused, str):
        compiled = _compiled(fused, sampled_in(own, precision, True, bool(fused.matrices.adapted)), native_limit, memory)
        if not isinstance(compiled, str):
            return Choice(compiled, reference)
        because = compiled
    if precision is not None and precision != own:
        twin = narrowed(model, precision)
        reference = ModelForward(twin)
        verify_forward(reference, reference)
        fused = fused if isinstance(fused, str) else _fused(reference)
    if not isinstance(fused, str) and fused.matrices.adapted and fused.geometry.dtype in HALVES:
        fused = because
    return Choice(reference, reference, fused, twin) if isinstance(fused, str) else Choice(fused, reference, because, twin)


def _fused(reference: ModelForward) -> FusedForward | str:
    """The fused forward where the model's code is known and the self-check agrees, else why not."""
    fused = recognise(reference)
    return _tried(lambda: fused, reference) if fused else f"the kernels do not know {reference.title}"


def _compiled(fused: FusedForward, precision: torch.dtype, limit: int | None, memory: int) -> CompiledForward | str:
    """The kernels in this precision where they serve the model, else why not."""
    return misfit(fused, precision, limit, memory) or _tried(lambda: CompiledForward(fused, precision), fused.reference)


def _tried(make: Callable[[], F], reference: ModelForward) -> F | str:
    """A forward that passes the self-check, or what stopped it: whatever that is, a slower way is there."""
    try:
        forward = make()
        verify_forward(forward, reference)
    except Exception as error:
        return message_of(error)
    return forward


def narrowed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the model with its parameters in `dtype`; buffers (rotary frequencies) keep their precision."""
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return twin
