"""Activation checkpointing: each layer keeps only its input, and is computed again in the backward pass, on the tree both times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ramulus.learn.attention.tree_attention import attending
from ramulus.learn.policy.fused_layers import Patch, fused


def checkpointed(model: nn.Module) -> list[Any]:
    """The layers whose activations can be computed again; ValueError where the architecture has none."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that support activation checkpointing: set activation_checkpointing=False"
        )
    return layers


@contextmanager
def recomputing(layers: Sequence[Any], model: nn.Module, quick: Sequence[Patch] = ()) -> Iterator[None]:
    """Inside, each layer keeps only its input for the backward pass.

    A layer checkpoints in training mode only: its own flag is set, its children's are not, and not its own while it computes, so no dropout wakes
    up. The backward pass may run outside of `attending`, so the recomputation attends by itself, and computes the modules in `quick` as the forward
    pass did.
    """
    for layer in layers:
        layer.gradient_checkpointing = layer.training = True
        layer._gradient_checkpointing_func = partial(again, layer, model, quick)
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def again(layer: nn.Module, model: nn.Module, quick: Sequence[Patch], forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer's `forward`, and once more in the backward pass."""
    contexts = lambda: (nullcontext(), as_before(model, quick))  # noqa: E731
    return checkpoint(partial(calm, layer, forward), *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def calm(layer: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a layer's `forward` out of training mode."""
    before, layer.training = layer.training, False
    try:
        return forward(*inputs)
    finally:
        layer.training = before


@contextmanager
def as_before(model: nn.Module, quick: Sequence[Patch]) -> Iterator[None]:
    """What a forward pass that is repeated in the backward pass needs around it."""
    with attending(model), fused(quick):
        yield
