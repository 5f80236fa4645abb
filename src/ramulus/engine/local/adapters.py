"""Linear layers under LoRA adapters (peft), read as one matrix each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Matrices:
    """The weights of a model's linear layers as they compute now, by the weights that they were made with."""

    def __init__(self) -> None:
        self.adapted: dict[int, Any] = {}  # peft's layers by the id of the weight below their adapters

    def pair(self, module: Any) -> tuple[Tensor, Tensor | None] | None:
        """The weight [m, k] and bias [m] of a linear layer, without its adapters; None for another kind of layer, or of adapters."""
        if type(module) is nn.Linear:
            return module.weight, module.bias
        if not is_lora(module):
            return None
        self.adapted[id(module.base_layer.weight)] = module
        return module.base_layer.weight, module.base_layer.bias

    @torch.no_grad()
    def whole(self, weight: Tensor) -> Tensor:
        """The weight with its adapters, a new tensor of at least float32; the weight itself where none are on it.

        Rounded to bfloat16, weights that were bfloat16 before would lose most of what adapters add.
        """
        module = self.adapted.get(id(weight))
        if module is None or module.merged or module.disable_adapters:
            return weight
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in module.active_adapters:
            if name in module.lora_A:
                merged = merged + module.get_delta_weight(name).to(merged.dtype)
        return merged


def is_lora(module: Any) -> bool:
    """Whether a module is a linear layer with plain low-rank adapters on it: no DoRA and the like, no biases of their own."""
    kind = type(module)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear") or type(module.base_layer) is not nn.Linear:
        return False
    biased = any(part.bias is not None for part in module.lora_B.values())
    return not (biased or module.lora_variant or module.fan_in_fan_out)
