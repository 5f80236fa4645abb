"""float32 masters of parameters in half precision: at the learning rates of RL an update is smaller than their rounding and would be lost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class MasterWeights:
    """What an optimizer steps in place of some parameters: float32 copies of those in half precision, the others themselves.

    `exact` False makes no copies: the optimizer steps what the model computes with.
    """

    def __init__(self, exact: bool = True) -> None:
        self.exact = exact
        self.stepped: dict[str, Tensor] = {}  # by the names of the parameters
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}  # (parameter, master) of those that are copies

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add parameters by name, with float32 copies of the half-precision ones."""
        for name, parameter in parameters.items():
            master = parameter
            if self.exact and parameter.dtype in HALF:
                master = nn.Parameter(parameter.detach().float())
                self.pairs[name] = (parameter, master)
            self.stepped[name] = master

    def hold_gradients(self) -> list[Tensor]:
        """Give the masters the gradients of their parameters; everything that has a gradient now."""
        for parameter, master in self.pairs.values():
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        return [tensor for tensor in self.stepped.values() if tensor.grad is not None]

    @torch.no_grad()
    def round_off(self) -> None:
        """Set the parameters to their masters, rounded."""
        for parameter, master in self.pairs.values():
            parameter.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """The masters, for a checkpoint."""
        return {f"master/{name}": master.detach() for name, (_, master) in self.pairs.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `tensors()`; a checkpoint without masters has the parameters themselves."""
        for name, (parameter, master) in self.pairs.items():
            master.copy_(tensors.get(f"master/{name}", parameter))
