"""A model apart from its numbers: copies in which the parameters are others, or are none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn


def copied(thing: Any, parameters: Mapping[int, nn.Parameter]) -> Any:
    """A deep copy in which parameters, by their ids, are those given; what is one object stays one."""
    return copy.deepcopy(thing, dict(parameters))


def elsewhere(model: nn.Module, device: str) -> dict[int, nn.Parameter]:
    """For `copied`: each parameter of a model on another device ("meta" for none, which takes no memory), by the id of the old one."""
    return {id(p): nn.Parameter(p.detach().to(device, copy=True), p.requires_grad) for p in model.parameters()}
