"""Weights as bytes: safetensors, with tied tensors once; nothing that runs code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TIED = "ramulus.tied"  # the key of the metadata that says which names share a tensor

_Table = Mapping[tuple[int, ...], list[float]]
"""What the toy engine has for weights."""


def to_bytes(weights: Mapping[Any, Any]) -> bytes:
    """A state dict of tensors, or the toy engine's table, as one body."""
    if all(isinstance(name, tuple) for name in weights):
        return json.dumps([[list(context), list(row)] for context, row in weights.items()]).encode()
    from safetensors.torch import save

    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    tensors = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[name] = tensor.detach() if alone else tensor.detach().clone().contiguous()
    return save(tensors, {TIED: json.dumps(tied)})


def state_of_bytes(body: bytes) -> dict[str, Any]:
    """The state dict of a body, on the CPU; ValueError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(body[:8], "little")
        tied = json.loads(json.loads(body[8 : 8 + size]).get("__metadata__", {}).get(TIED, "{}"))
        state = load(body)
        return state | {name: state[other] for name, other in tied.items()}
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"these are no weights ({error}): send a state dict as safetensors") from None


def table_of_bytes(body: bytes) -> _Table:
    """The toy engine's table of a body; ValueError where it is none."""
    try:
        return {tuple(int(token) for token in context): [float(x) for x in row] for context, row in json.loads(body)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"this is no table ({error}): send [[context, logits], ...]") from None
