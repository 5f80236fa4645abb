"""A model taken apart into its structure and its numbers, and put together again on every rank, each with its shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ramulus.models.precision import HALVES


@dataclass(frozen=True)
class Spread:
    """How a policy is spread over ranks, beside what it is."""

    sharing: int  # ranks that hold one copy of the weights together
    device: str = "cpu"  # or cuda
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    float32_masters: bool = True
    offload: bool = False
    adam: str = "exact"  # or 8bit
    seconds: float = 1800.0  # for which ranks wait for each other


def mesh_of(size: int, sharing: int, device: str) -> DeviceMesh:
    """Ranks that hold one copy of the weights together, `sharing` of them, and copies where there are more ranks."""
    if sharing == size:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (size // sharing, sharing), mesh_dim_names=("replicate", "shard"))


def units(model: nn.Module) -> list[nn.Module]:
    """What is sharded by itself: the blocks of the outermost lists, but for those that share parameters with anything else.

    The rest is of the root, where tied weights stay tied.
    """
    owners = _owners(model)
    candidates: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            candidates.append(child) if isinstance(module, nn.ModuleList) else walk(child)

    walk(model)
    blocks = [(block, _owners(block)) for block in candidates]
    return [block for block, mine in blocks if mine and all(owners[key] == count for key, count in mine.items())]


def _owners(model: nn.Module) -> Counter[int]:
    """How often each parameter, by its id, is met below a module."""
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def shard(root: nn.Module, numbers: Mapping[str, Tensor] | None, mesh: DeviceMesh) -> None:
    """Give a model on the meta device its numbers, from rank 0 where they are by name, and shard it, one unit after the other.

    No rank but rank 0 ever holds more than one unit whole.
    """
    by_ghost: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the id of its ghost, which is kept: no other gets that id
    paths = {module: name for name, module in root.named_modules()}
    for unit in [*units(root), root]:
        for path, name, owner in without_numbers(unit, paths[unit]):
            ghost = owner._parameters[name]
            assert ghost is not None
            if id(ghost) not in by_ghost:
                by_ghost[id(ghost)] = ghost, received(ghost, None if numbers is None else numbers[path], mesh)
            owner._parameters[name] = by_ghost[id(ghost)][1]
        half = any(p.dtype in HALVES for p in unit.parameters())
        fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None))
        unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # the loss is a sum over the step, not a mean over ranks
        unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no other


def without_numbers(unit: nn.Module, prefix: str) -> Iterator[tuple[str, str, nn.Module]]:
    """(path from the root, name, module) of every parameter that has no numbers yet, tied ones as often as they have names."""
    for where, module in unit.named_modules(prefix=prefix):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                yield f"{where}.{name}" if where else name, name, module


def received(ghost: nn.Parameter, number: Tensor | None, mesh: DeviceMesh) -> nn.Parameter:
    """A parameter as rank 0 has it."""
    here = torch.empty_like(ghost, device=mesh.device_type) if number is None else number.detach().to(mesh.device_type).contiguous().clone()
    dist.broadcast(here, 0)
    return nn.Parameter(here, ghost.requires_grad)
