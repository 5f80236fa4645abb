"""What a token's forward pass keeps for the backward pass, read off autograd on the model that is loaded: no table knows every architecture."""

from __future__ import annotations

from typing import cast

import torch

from ramulus.learn.policy.learner import Learner, MeasuredLearner
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.models.sizes import Sizes

SHORT, LONG = 32, 96  # tokens of the two rows: what does not grow with them (copies of weights, tables) falls out of their difference
BELOW_AND_ABOVE = 8.0  # bytes of each number of the hidden state that the embeddings and the last norm keep


async def kept_by_layer(learner: Learner, sizes: Sizes) -> float:
    """Bytes that a layer keeps of a token, every layer's mean; 0 where the learner does not measure it, or knows too few positions."""
    longest = min(LONG, sizes.positions)
    if "measured" not in learner.features or longest < 2 * SHORT:
        return 0.0
    few, many = [await cast(MeasuredLearner, learner).kept_bytes(tokens) for tokens in (SHORT, longest)]
    return max(0.0, (many - few) / (longest - SHORT) - BELOW_AND_ABOVE * sizes.hidden) / sizes.layers


def kept_in_layers(policy: TorchPolicy, tokens: int) -> int:
    """`kept_bytes` with all of every layer, also where only its input is kept."""
    layers, policy.layers = policy.layers, []
    try:
        return kept_bytes(policy, tokens)
    finally:
        policy.layers = layers
        policy.narrow.forget()


def kept_bytes(policy: TorchPolicy, tokens: int) -> int:
    """Bytes that the forward pass over a path of so many tokens keeps for the backward pass, without the model's own weights and the head."""
    position = torch.arange(tokens, device=policy.device)
    weights = {x.untyped_storage().data_ptr() for x in (*policy.model.parameters(), *policy.model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    size = int(policy.model.get_input_embeddings().num_embeddings)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), policy._casting():
        policy._hidden(policy.model, position % size, position, (position - 1).clamp(min=0), torch.full_like(position, tokens))
    return sum(storage.nbytes() for at, storage in held.items() if at not in weights)
