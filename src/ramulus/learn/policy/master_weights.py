"""float32 masters of parameters in half precision: at the learning rates of RL an update is smaller than their rounding and would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ramulus.models.precision import HALVES

ROWS_TOGETHER = 16  # rows whose gradients add up in half precision: beyond some 256 a sum stands still


class MasterWeights:
    """What an optimizer steps in place of some parameters: themselves, or copies, in float32 of those in half precision, on `device` if one is given.

    `exact` False makes no copies in float32. Of parameters that are spread over ranks it steps the part here, which `local` answers.
    """

    def __init__(self, exact: bool = True, device: str | None = None, local: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.exact, self.device, self.local = exact, device, local
        self.rows = 0  # whose gradients the parameters hold
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

    def begin_row(self) -> None:
        """Before the gradient of a row is added: those of every ROWS_TOGETHER rows before it go to wider copies, if there are any."""
        if self.rows == ROWS_TOGETHER:
            self._move([name for name, stepped in self.stepped.items() if stepped.dtype != self.parameters[name].dtype])
            self.rows = 0
        self.rows += 1

    def _move(self, names: Iterable[str]) -> None:
        """Add the gradients of some parameters to those of their copies."""
        for name in names:
            parameter, stepped = self.parameters[name], self.stepped[name]
            if stepped is not parameter and parameter.grad is not None:
                gradient = self.local(parameter.grad).to(stepped.device, stepped.dtype)
                stepped.grad = gradient if stepped.grad is None else stepped.grad.add_(gradient)
                parameter.grad = None

    def hold_gradients(self) -> list[Tensor]:
        """Give what is stepped the gradients of its parameters; all that there are."""
        self._move(self.parameters)
        self.rows = 0
        return [stepped.grad for stepped in self.stepped.values() if stepped.grad is not None]

    def discard(self) -> None:
        """Drop the gradients so far."""
        self.rows = 0
        for each in (*self.parameters.values(), *self.stepped.values()):
            each.grad = None

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
