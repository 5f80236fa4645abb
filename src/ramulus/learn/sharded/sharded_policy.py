"""A policy whose weights are spread over ranks: each computes its own rows, and the ranks go through them in step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ramulus.core.tree import Author
from ramulus.learn.batch.score_row import ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.learner import Evaluated
from ramulus.learn.policy.master_weights import MasterWeights
from ramulus.learn.policy.narrow import Narrow
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.policy.value_head import ActorCritic
from ramulus.learn.policy.writing import read_back, write_model
from ramulus.learn.sharded.optimizer import local_part, optimizer_of, set_rate, step_with
from ramulus.learn.sharded.placing import Spread, mesh_of, shard
from ramulus.models.structure import copied, elsewhere

LEFT_OUT = ("optimizer", "masters", "trainable", "tokenizer")  # of a whole policy: what each rank makes anew


class Root(nn.Module):
    """What one forward pass computes, body, head and critic: the unit that gathers whatever is in no layer."""

    def __init__(self, model: nn.Module, critic: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.critic = model, critic

    def forward(self, policy: ShardedPolicy, row: Any, target: Tensor, bare: bool, rest: tuple[Any, ...], more: dict[str, Any]) -> Evaluated:
        """A row's columns; one pass over all layers, whatever the row holds."""
        return policy.pass_over(self.model, row, target, bare or not bool(target.any()), rest, more)


class ShardedPolicy(ActorCritic):
    """As TorchPolicy, over several ranks: every method but `version` is called by all of them at once, with as many rows each."""

    def __init__(self, structure: dict[str, Any], spread: Spread, size: int, numbers: Sequence[Mapping[str, Tensor]] | None) -> None:
        self.__dict__.update(structure)
        self.device = torch.device(spread.device, torch.cuda.current_device()) if spread.device == "cuda" else torch.device("cpu")
        self.mesh: DeviceMesh = mesh_of(size, spread.sharing, spread.device)
        self.store_mesh = self.mesh if spread.device == "cpu" else mesh_of(size, spread.sharing, "cpu")
        models = [(self.model, self.critic), *([(self.reference, None)] if self.reference is not None else [])]
        self.roots = {id(model): Root(model, critic) for model, critic in models}
        for i, root in enumerate(self.roots.values()):
            shard(root, None if numbers is None else numbers[i], self.mesh)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        head = {f"critic/{name}": p for name, p in self.critic.named_parameters()} if self.critic is not None else {}
        self.trainable = trained | head
        names = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        self.tied = {name: first.setdefault(id(self.model.get_parameter(name)), name) for name in names}
        self.masters = MasterWeights(spread.float32_masters, "cpu" if spread.offload else None, local_part)
        self.masters.take(self.trainable)
        self.optimizer = optimizer_of(self.masters.stepped, spread)

    @classmethod
    def parts_of(cls, whole: TorchPolicy) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
        """The structure of a policy, to be sent to the other ranks, and its numbers: of the model, and of the reference model if it keeps one."""
        if whole.wrapped is not None:
            assert whole.below  # which is read while the weights are whole, and kept
        roots = [Root(whole.model, whole.critic), *([Root(whole.reference)] if whole.reference is not None else [])]
        kept = {name: value for name, value in vars(whole).items() if name not in LEFT_OUT}
        kept |= {"patches": [], "reference_patches": [], "head": replace(whole.head, narrow=None), "narrow": Narrow()}  # kernels know no shards
        ghosts = {key: ghost for root in roots for key, ghost in elsewhere(root, "meta").items()}
        return copied(kept, ghosts), [dict(root.named_parameters(remove_duplicate=False)) for root in roots]

    def _logprobs(self, model: Any, row: Any, target: Tensor, *rest: Any, bare: bool = False, **more: Any) -> Evaluated:
        columns: Evaluated = self.roots[id(model)](self, row, target, bare, rest, more)
        return columns

    def pass_over(self, model: Any, row: Any, target: Tensor, bare: bool, rest: tuple[Any, ...], more: dict[str, Any]) -> Evaluated:
        """As TorchPolicy computes a row, once the root has its weights together."""
        return super()._logprobs(model, row, target, *rest, **more | {"bare": bare})

    def read(self, hidden: Tensor, parent: Tensor) -> Tensor | None:  # type: ignore[override]
        """Values [T], where there is a value head."""
        return None if self.critic is None else super().read(hidden, parent).clone()  # FSDP wants no views of its outputs

    def accumulate(self, mix: Mix, batch: TreeBatch | None) -> Evaluated:  # type: ignore[override]
        """Add the gradient of one row, or of none: a pad whose gradient is exactly zero, for ranks that have rows left."""
        if batch is not None:
            return super().accumulate(mix, batch)
        self.masters.begin_row()
        row = pad_row()
        token, position, parent, end = (x.to(self.device) for x in (row.token, row.position, row.parent, row.end))
        target = row.author.to(self.device) == int(Author.POLICY)
        evaluated = self._logprobs(self.model, (token, position, parent, end), target, None, mix.entropy_bonus != 0)
        value = evaluated.value if mix.value else None
        (0.0 * (evaluated.plain.sum() + (0 if value is None else value.sum()))).backward()
        return evaluated.each(Tensor.detach)

    def update(self, lr: float) -> dict[str, float]:
        """Clip by the norm over all ranks, step and clear; where there is no gradient, or the norm is not finite, only the latter."""
        held = self.masters.hold_gradients()
        norm, some = self._norm(held)
        step = some and math.isfinite(norm)
        if step:
            scale = min(self.clip / (norm + 1e-6), 1.0)
            for gradient in held if scale < 1 else ():
                gradient.mul_(scale)
            set_rate(self.optimizer, lr)
            step_with(self.optimizer)
            self.masters.round_off()
            self.version += 1
        self.skipped += not step
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": float(not step)}

    def _norm(self, held: Sequence[Tensor]) -> tuple[float, bool]:
        """The norm of the whole gradient, the same bits on every rank, and whether there is any."""
        mine = torch.stack([*(g.double().square().sum().cpu() for g in held), torch.zeros((), dtype=torch.float64)]).sum()
        group = self.store_mesh.get_group("shard")
        every = [torch.zeros(2, dtype=torch.float64) for _ in range(group.size())]
        torch.distributed.all_gather(every, torch.stack([mine, torch.tensor(float(len(held)), dtype=torch.float64)]), group=group)
        total = torch.stack(every).sum(0)
        return float(total[0].sqrt()), bool(total[1] > 0)

    def whole(self, keep: bool) -> dict[str, Tensor]:
        """`weights`, gathered one after the other, on the CPU of a rank that is to `keep` them; others get nothing."""
        for root in self.roots.values():
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        weights: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, tensor in super().weights().items():
                first = self.tied.get(name, name)
                if first != name and first in weights:
                    weights[name] = weights[first]
                    continue
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                weights[name] = full.detach().to("cpu", copy=True) if keep else full.new_empty(0)
        return weights if keep else {}


def pad_row() -> ScoreRow:
    """A row of two tokens, the second of which the policy wrote; of no tree and no path."""
    written, none = torch.tensor([int(Author.PROMPT), int(Author.POLICY)]), torch.zeros(0, dtype=torch.long)
    first, ends = torch.zeros(2, dtype=torch.long), torch.full((2,), 2)
    return ScoreRow(first, torch.arange(2), first, ends, written, none, none, [], torch.ones(2, dtype=torch.float64))


def write_whole(path: Path, skeleton: Any, tokenizer: Any, state: Mapping[str, Tensor], check: bool) -> None:
    """A plain Hugging Face folder of gathered weights; with `check` it is loaded back and compared. `skeleton` is the model on the meta device."""
    model = copied(skeleton, elsewhere(skeleton, "meta"))
    model.load_state_dict(dict(state), strict=True, assign=True)
    write_model(path, model, tokenizer, None)
    if check:
        read_back(path, model, tokenizer, state)
