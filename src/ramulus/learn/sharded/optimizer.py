"""The optimizer of a rank, which steps its own rows of each trained parameter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ramulus.learn.policy.value_head import SPEED
from ramulus.learn.sharded.placing import Spread


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def optimizer_of(stepped: Mapping[str, nn.Parameter], spread: Spread) -> Any:
    """AdamW as TorchPolicy has it: matrices decay, the rest does not, and a value head learns faster."""
    body = {name: p for name, p in stepped.items() if not name.startswith("critic/")}
    groups = [([p for p in body.values() if (p.ndim >= 2) == matrix], decay, 1.0) for matrix, decay in ((True, spread.weight_decay), (False, 0.0))]
    groups.append(([p for name, p in stepped.items() if name not in body], 0.0, SPEED))
    listed = [{"params": group, "weight_decay": decay, "speed": speed} for group, decay, speed in groups if group]
    if spread.adam == "8bit":
        return eight_bits()(listed, lr=0.0, betas=spread.betas, eps=spread.eps)
    return torch.optim.AdamW(listed, lr=0.0, betas=spread.betas, eps=spread.eps, fused=True)


def eight_bits() -> Any:
    """AdamW with moments in 8 bits, block by block (arXiv 2110.02861); ImportError without torchao."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ImportError('learner.adam=8bit needs torchao: pip install "ramulus[sharded]"') from error
    return AdamW8bit


def step_with(optimizer: Any) -> None:
    """One step. On CPUs moments in 8 bits are stepped uncompiled: torchao compiles a kernel for each shape, which takes minutes of C++."""
    here = any(p.is_cpu for group in optimizer.param_groups for p in group["params"])
    with torch.compiler.set_stance("force_eager") if here and hasattr(optimizer, "_new_buffer") else nullcontext():
        optimizer.step()


def set_rate(optimizer: Any, lr: float) -> None:
    """The rate of every group, times its speed."""
    for group in optimizer.param_groups:
        rate = lr * group["speed"]
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate  # torchao wants its own tensor


def codes_of(value: Tensor) -> dict[str, Tensor]:
    """What a moment in 8 bits is made of; nothing for one in floating point."""
    return {part: getattr(value, part) for part in ("codes", "scale")} if hasattr(value, "codes") else {}
