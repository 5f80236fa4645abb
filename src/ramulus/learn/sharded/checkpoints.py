"""Checkpoints of a policy over ranks: each writes its own shards, and any number of ranks reads them (torch.distributed.checkpoint)."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ramulus.learn.policy.children import portable
from ramulus.learn.policy.torch_policy import ADAM
from ramulus.learn.sharded.optimizer import codes_of, local_part

if TYPE_CHECKING:
    from ramulus.learn.sharded.sharded_policy import ShardedPolicy

SHARDS = "shards"  # the folder in a checkpoint
LATE = 5.0  # seconds after which a file that another machine wrote is to be seen here
SHARED_DISK = "put the run's folder, out, on a disk that the machines of all ranks share"
TENSORS_FILE = "tensors.safetensors"  # what a learner of one process writes in its place


@torch.no_grad()
def write_shards(policy: ShardedPolicy, folder: Path) -> None:
    """Write what this rank holds: trained weights (or their float32 copies), moments, the reference model. All ranks at once."""
    held: dict[str, Tensor] = {}
    with on_all_ranks():
        held |= {name: spread(policy, parameter, mine) for name, parameter, mine in kept_places(policy)}
        for name, stepped in policy.masters.stepped.items():
            for part, value in policy.optimizer.state.get(stepped, {}).items():
                key = f"adam/{part}/{name}"
                held[key] = spread(policy, policy.trainable[name], in_floats(value)) if part != "step" else value.cpu()
                held |= {f"{this_rank()}/{key}/{what}": code.cpu() for what, code in codes_of(value).items()}
    at_once(lambda: dcp.save(held, checkpoint_id=folder / SHARDS))


@torch.no_grad()
def read_shards(policy: ShardedPolicy, folder: Path, state: dict[str, Any]) -> None:
    """Take back what any number of ranks, or a learner of one process, wrote. All ranks at once.

    Raises ValueError where the checkpoint is of another model.
    """
    with on_all_ranks():
        policy.check_below(state)
        files = asked_files(policy, folder)
    files.read()
    policy.masters.round_off()
    policy.version, policy.skipped = int(state["version"]), int(state["skipped"])


def asked_files(policy: ShardedPolicy, folder: Path) -> WholeFiles | RankFiles:
    """The files of a checkpoint, asked for this rank's part of all that a policy keeps."""
    files = WholeFiles(folder) if (folder / TENSORS_FILE).is_file() else RankFiles(folder)
    for name, parameter, mine in kept_places(policy):
        named = next((known for known in other_names(name) if known in files.shapes), name)
        if files.shapes.get(named) != tuple(parameter.shape):
            held = f"{files.shapes[named]} as" if named in files.shapes else "no"
            raise ValueError(f"the checkpoint has {held} {named}, the model wants {tuple(parameter.shape)}: resume with the model it is of")
        files.ask(named, spread(policy, parameter, torch.empty_like(mine, device="cpu")), mine)
    policy.optimizer.state.clear()
    for name, stepped in policy.masters.stepped.items():
        for part in (part for part in ADAM if f"adam/{part}/{name}" in files.shapes):
            like, key = moment(policy, stepped, part), f"adam/{part}/{name}"
            policy.optimizer.state[stepped][part] = like
            exact = {what: code for what, code in codes_of(like).items() if files.shapes.get(f"{this_rank()}/{key}/{what}") == tuple(code.shape)}
            for what, code in exact.items():  # written by as many ranks: the very bits
                files.ask(f"{this_rank()}/{key}/{what}", torch.empty_like(code, device="cpu"), code)
            if not exact:
                files.ask(key, like if part == "step" else spread(policy, policy.trainable[name], in_floats(like)), like)
    return files


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """At its end an error that any rank had inside is raised on all of them, the first rank's that had one. All ranks at once."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    every: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, None if mine is None else portable(mine))
    for first in every:
        if first is not None:
            raise first from mine


def check_files(folder: Path, seconds: float = 0.0) -> None:
    """Raise FileNotFoundError where what a rank wrote of a checkpoint is not in the folder after so many seconds, and say which rank's."""
    shards, limit = folder / SHARDS, time.monotonic() + seconds
    if not (shards / ".metadata").is_file():
        raise FileNotFoundError(f"{platform.node()} finds no {shards}: {SHARED_DISK}")
    parts = {str(entry.relative_path) for entry in dcp.FileSystemReader(shards).read_metadata().storage_data.values()}
    for part in sorted(parts):
        while not (shards / part).is_file():
            if time.monotonic() > limit:
                rank = part.strip("_").partition("_")[0]  # torch names them __RANK_NUMBER.distcp
                raise FileNotFoundError(f"what rank {rank} wrote of a checkpoint, {shards / part}, is not there on {platform.node()}: {SHARED_DISK}")
            time.sleep(0.1)


def this_rank() -> str:
    """What only this rank of so many holds."""
    return f"rank-{dist.get_rank()}-of-{dist.get_world_size()}"


def in_floats(value: Tensor) -> Tensor:
    """A moment in floating point, though it be kept in 8 bits."""
    floats: Tensor = value.dequantize() if codes_of(value) else value
    return floats


def moment(policy: ShardedPolicy, stepped: Tensor, part: str) -> Tensor:
    """Room for what the optimizer keeps of a parameter."""
    if part == "step":
        return torch.zeros(())
    new: Tensor = policy.optimizer._new_buffer(stepped, part == "exp_avg") if hasattr(policy.optimizer, "_new_buffer") else torch.empty_like(stepped)
    return new


def kept_places(policy: ShardedPolicy) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name in a checkpoint, parameter, this rank's numbers of it) of what is kept beside the moments."""
    for name, stepped in policy.masters.stepped.items():
        parameter = policy.trainable[name]
        yield f"{'weights' if stepped.dtype == parameter.dtype else 'master'}/{name}", parameter, stepped.detach()
    for name, parameter in policy.reference.named_parameters() if policy.reference is not None else ():
        yield f"reference_model/{name}", parameter, local_part(parameter).detach()


def other_names(name: str) -> tuple[str, ...]:
    """Under which names a checkpoint may have it: copies in float32, or the weights that they are of."""
    kind, _, rest = name.partition("/")
    return (name,) if kind == "reference_model" else (name, f"{'weights' if kind == 'master' else 'master'}/{rest}")


def spread(policy: ShardedPolicy, parameter: Tensor, mine: Tensor) -> DTensor:
    """This rank's numbers of a parameter as part of the whole, on the CPU."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        mine.detach().cpu(), policy.store_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def at_once(work: Callable[[], Any]) -> None:
    """What all ranks do at once; the first one's error on each of them."""
    try:
        work()
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


class RankFiles:
    """What ranks wrote: each tensor as the pieces that they held."""

    def __init__(self, folder: Path) -> None:
        check_files(folder)
        self.reader = dcp.FileSystemReader(folder / SHARDS)
        known = self.reader.read_metadata().state_dict_metadata
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(meta.size) for name, meta in known.items() if hasattr(meta, "size")}
        self.asked: dict[str, Tensor] = {}
        self.into: list[tuple[Tensor, Tensor]] = []

    def ask(self, name: str, shape: Tensor, into: Tensor) -> None:
        """Want this rank's part of a tensor; `shape` says which that is, and is read into."""
        self.asked[name] = shape
        self.into.append((shape, into))

    def read(self) -> None:
        """Read all that was asked for, each into its place."""
        at_once(lambda: dcp.load(self.asked, storage_reader=self.reader))
        for piece, into in self.into:
            into.copy_(local_part(piece))


class WholeFiles:
    """What a learner of one process wrote: whole tensors, of which each rank reads its rows."""

    def __init__(self, folder: Path) -> None:
        model = sorted((folder / "model").glob("*.safetensors"))
        self.files = {file: safe_open(file, "pt") for file in (*model, folder / TENSORS_FILE)}
        prefixes = {file: "" if file.name == TENSORS_FILE else "weights/" for file in self.files}
        self.names = {prefixes[file] + name: (file, name) for file, opened in self.files.items() for name in opened.keys()}  # noqa: SIM118
        self.shapes = {known: tuple(self.files[file].get_slice(name).get_shape()) for known, (file, name) in self.names.items()}

    def ask(self, name: str, shape: Tensor, into: Tensor) -> None:
        """Read this rank's part of a tensor into its place; `shape` says which that is."""
        file, inside = self.names[name]
        if not isinstance(shape, DTensor):
            into.copy_(self.files[file].get_tensor(inside))
            return
        size, offset = compute_local_shape_and_global_offset(shape.shape, shape.device_mesh, shape.placements)
        if into.numel():
            into.copy_(self.files[file].get_slice(inside)[offset[0] : offset[0] + size[0]])

    def read(self) -> None:
        """Nothing is left to read."""
