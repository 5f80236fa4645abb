"""float32 masters of parameters in half precision: at the learning rates of RL an update is smaller than their rounding and would be lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ramulus.models.precision import HALVES


class MasterWeights:
    """What an optimizer steps in place of some parameters: themselves, or copies, in float32 of those in half precision, on `device` if one is given.

    `exact` False makes no copies in float32. Of parameters that are spread over ranks it steps the part here, which `local` answers.
    """

    def __init__(self, exact: bool = True, device: str | None = None, local: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.exact, self.device, self.local = exact, device, local
        self.parameters: dict[str, nn.Parameter] = {}
        self.stepped: dict[str, nn.Parameter] = {}  # by the names of the parameters
        self.copies: list[str] = []  # names of those that are copies; the others share the memory of their parameters

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add parameters by name."""
        for name, parameter in parameters.items():
            mine = self.local(parameter)
            here = mine.detach()
            master = here.to(self.device or here.device, torch.float32 if self.exact and here.dtype in HALVES else here.dtype)
            self.parameters[name] = parameter
            self.stepped[name] = parameter if master is here and mine is parameter else nn.Parameter(master)
            self.copies += [] if master is here else [name]

    def hold_gradients(self) -> list[Tensor]:
        """Give what is stepped the gradients of its parameters; all that there are."""
        for name, parameter in self.parameters.items():
            stepped = self.stepped[name]
            if stepped is not parameter:
                stepped.grad = None if parameter.grad is None else self.local(parameter.grad).to(stepped.device, stepped.dtype)
                parameter.grad = None
        return [stepped.grad for stepped in self.stepped.values() if stepped.grad is not None]

    @torch.no_grad()
    def round_off(self) -> None:
        """Set the parameters to their copies, rounded."""
        for name in self.copies:
            self.local(self.parameters[name]).copy_(self.stepped[name])

    def tensors(self) -> dict[str, Tensor]:
        """The copies, for a checkpoint."""
        return {f"master/{name}": self.stepped[name].detach() for name in self.copies}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `tensors()`; a checkpoint without masters has the parameters themselves."""
        for name in self.copies:
            self.stepped[name].copy_(tensors.get(f"master/{name}", self.parameters[name]))
