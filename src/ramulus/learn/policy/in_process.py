"""A learner in this process: a policy whose work is done in a thread of its own, so that the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import gc
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ramulus.core.new_folder import new_folder
from ramulus.learn.batch.score_row import Scored, ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.kept import kept_in_layers
from ramulus.learn.policy.learner import Called, Evaluated
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.models.errors import sentence
from ramulus.models.weights import Weights
from ramulus.native.blocks import keep_blocks, leave_blocks
from ramulus.native.memory import GIVES_BACK, OutOfMemory, allocation_failed, give_back, large_pages_refused
from ramulus.native.openmp import release_team

_T = TypeVar("_T")


class Thread:
    """One thread that works while the event loop waits, with as many threads of torch as the one that made it."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "learner", torch.set_num_threads, (torch.get_num_threads(),))
        self.left = Event()  # nobody waits for the work any more

    async def do(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """What `work` answers or raises. Where the wait is cancelled, `left` is set, for work that can stop half-way."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)
        except asyncio.CancelledError:
            self.left.set()
            raise

    def close(self) -> None:
        """End it, once its work is done."""
        self.pool.shutdown(wait=False)


def _worked(work: Callable[..., _T], *arguments: Any) -> _T:
    """What `work` answers; the threads that helped are given back."""
    try:
        return work(*arguments)
    finally:
        release_team()


class InProcess(Called):
    """A Learner whose policy lives here; engines of this process can read its parameters. On a CPU a MeasuredLearner."""

    def __init__(self, policy: TorchPolicy, keeps: bool = False) -> None:
        self.policy, self.thread, self.keeps = policy, Thread(), keeps and keep_blocks_of(policy)
        self.features = frozenset({"in_place", "live"} | ({"measured"} if policy.device.type == "cpu" else set()))  # a GPU would compile

    @property
    def version(self) -> int:
        """How many updates the weights have had."""
        return self.policy.version

    async def call(self, name: str, *arguments: Any) -> Any:
        """What a call answers; neither thread keeps OpenMP's threads while the other computes."""
        release_team()
        return await self.thread.do(_worked, CALLS[name], self.policy, *arguments)

    async def accumulate(self, mix: Mix, batches: Sequence[TreeBatch]) -> list[Evaluated]:
        """Add the gradient of all rows, or of some of them where the wait is cancelled."""
        return await self.call("accumulate", mix, batches, self.thread.left)  # type: ignore[no-any-return]

    async def kept_bytes(self, tokens: int) -> int:
        """What a forward pass keeps for the backward pass."""
        return await self.call("kept_bytes", tokens)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the thread; blocks of memory are no longer kept."""
        self.thread.close()
        if self.keeps:
            self.keeps = False
            leave_blocks()


def accumulated(policy: TorchPolicy, mix: Mix, batches: Sequence[TreeBatch], left: Event | None = None) -> list[Evaluated]:
    """Add the gradient of some rows; their columns, on the CPU. Raises InterruptedError, between two rows, once nobody waits any more.

    Raises OutOfMemory for a row that memory does not hold; then there are no gradients at all.
    """
    evaluated = []
    with in_memory(policy.discard):
        for batch in batches:
            if left is not None and left.is_set():
                raise InterruptedError("the update was abandoned")
            evaluated.append(policy.accumulate(mix, batch).each(Tensor.cpu))
    give_back_after(policy)
    return evaluated


def give_back_after(policy: TorchPolicy) -> None:
    """Return the memory of activations to the system: else the optimizer, the engine and a checkpoint need theirs beside what the C library keeps."""
    if is_large(policy):
        give_back(blocks=False)


def keep_blocks_of(policy: TorchPolicy) -> bool:
    """Keep the memory that its tensors leave, where that is worth it; whether it is."""
    return policy.device.type == "cpu" and is_large(policy) and keep_blocks(not large_pages_refused())


def is_large(policy: TorchPolicy) -> bool:
    """Whether memory matters more than the time it takes to give it back."""
    return sum(p.nbytes for p in policy.model.parameters()) > GIVES_BACK


def scored(policy: TorchPolicy, rows: Sequence[ScoreRow], columns: Sequence[str], influence: Influence | None = None) -> list[Scored]:
    """What the policy scores; raises OutOfMemory for a row that memory does not hold."""
    with in_memory():
        return policy.score(rows, columns, influence)


@contextmanager
def in_memory(undo: Callable[[], None] | None = None) -> Iterator[None]:
    """Where an allocation fails inside, do `undo`, let go of what the failed work held, and raise OutOfMemory."""
    try:
        yield
        return
    except Exception as error:
        if not allocation_failed(error):
            raise
        failure = OutOfMemory(" ".join(str(error).split()) or type(error).__name__)
        traceback.clear_frames(error.__traceback__)
    if undo is not None:
        undo()
    gc.collect()  # a graph may lie in a circle with the frames that made it
    give_back()
    raise failure


@torch.no_grad()
def handed(policy: TorchPolicy, folder: Path | None, live: bool = False) -> Weights:
    """A policy's weights for an engine elsewhere: a new folder in `folder`, of which the one before is kept, or tensors on the CPU.

    `live`: the parameters themselves, where they are. What LoRA was merged into is a copy and goes to the CPU in any case.
    """
    if folder is None:
        stay = live and policy.wrapped is None
        return {name: tensor.detach() if stay else tensor.detach().cpu() for name, tensor in policy.weights().items()}
    return in_a_new_folder(folder, policy.version, policy.write)


def in_a_new_folder(folder: Path, version: int, write: Callable[[Path], object]) -> str:
    """Have a folder in `folder` written, whole or not at all; of those before it one is kept, for an engine that still reads it."""
    final = folder / f"version-{version:06d}"
    with new_folder(final) as part:
        write(part)
        shutil.rmtree(final, ignore_errors=True)
    for old in sorted(folder.glob("version-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)
    return str(final)


def saved(policy: TorchPolicy, folder: Path) -> dict[str, Any]:
    """Write `model` and `tensors.safetensors`: what is trained and not in `model`, the optimizer, the reference model, torch's generators.

    A model that cannot be written, or read back, is warned of, and loses no step: a run can go on from `tensors.safetensors` alone.
    """
    try:
        policy.write(folder / "model")
    except Exception as error:
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):  # a full disk, which holds no tensors either
            raise
        words = f"the model in {folder} cannot be relied on ({sentence(error)}): the run can be resumed from there, and goes on"
        warnings.warn(words, stacklevel=2)
    elsewhere = _held_by(folder / "model", {f"weights/{name}": tensor for name, tensor in policy.kept().items()})
    tensors = {name: tensor for name, tensor in policy.tensors().items() if name not in elsewhere} | random_tensors()
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")
    return policy.state()


def restored(policy: TorchPolicy, folder: Path, state: dict[str, Any]) -> None:
    """Take back what `saved` wrote and answered."""
    if (folder / "shards").is_dir():
        raise ValueError(f"{folder} is of learner=Sharded(...): go on with it, where there is one process with learner.ranks=1")
    tensors = load_file(folder / "tensors.safetensors")
    tensors |= _read_from(folder / "model", [name for name in (f"weights/{kept}" for kept in policy.kept()) if name not in tensors])
    policy.restore(tensors, state)
    restore_random_tensors(tensors)


CALLS: dict[str, Callable[..., Any]] = {
    "score": scored,
    "accumulate": accumulated,
    "update": lambda policy, lr: policy.update(lr),
    "weights": handed,
    "kept_bytes": kept_in_layers,
    "save": saved,
    "restore": restored,
}
"""What is done with a policy for each call."""


def _read_from(model: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors "weights/NAME" of `wanted` that the files of a model folder hold."""
    wanted: set[str] = set(names)
    weights: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")) if wanted else ():
        with safe_open(file, "pt") as opened:
            weights |= {f"weights/{name}": opened.get_tensor(name) for name in opened.keys() if f"weights/{name}" in wanted}  # noqa: SIM118
    return weights


def _held_by(model: Path, tensors: Mapping[str, Tensor]) -> set[str]:
    """Which tensors "weights/NAME" the files of a model folder hold bit for bit: they need not be written again."""
    same: set[str] = set()
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in (f"weights/{key}" for key in opened.keys()):  # noqa: SIM118
                mine = tensors.get(name)
                if mine is not None and _same_bits(opened.get_tensor(name.removeprefix("weights/")), mine.detach().cpu()):
                    same.add(name)
    return same


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type and equal."""
    return one.dtype == other.dtype and torch.equal(one, other)


def random_tensors() -> dict[str, torch.Tensor]:
    """The states of torch's generators."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random_tensors(states: Mapping[str, Tensor]) -> None:
    """Set torch's generators to what `random_tensors` answered."""
    torch.set_rng_state(states["random.cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"random.cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"random.cuda.{i}"], i)
