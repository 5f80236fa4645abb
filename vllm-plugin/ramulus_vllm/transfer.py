"""Weights that come without a file, into vLLM's own engines of weight transfer: broadcasts of a group of torch (gloo, NCCL), or CUDA IPC.

Whoever trains is rank 0 and listens; the workers of this server are the others. The two sides agree on what `ramulus.engine.vllm.transfer` says.
"""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

TYPES = {"Tensor": torch.Tensor, "TypedStorage": torch.storage.TypedStorage, "UntypedStorage": torch.UntypedStorage}
"""What a handle of CUDA IPC may name."""

Load = Callable[[Any], Any]
"""A model's `load_weights`."""


def refuse(way: str, gpu: str, device: torch.device) -> None:
    """Raise ValueError where weights cannot come this way from a GPU of this UUID to a worker's device."""
    if way not in ("gloo", "nccl", "ipc"):
        raise ValueError(f"this server takes no weights by {way!r}: install the same ramulus on both sides")
    if way == "gloo":
        return
    if device.type != "cuda":
        raise ValueError(f"this server computes on a CPU, and {way} goes from GPU to GPU: take engine.weights='gloo' or 'files'")
    mine = str(torch.cuda.get_device_properties(device).uuid)
    if way == "ipc" and mine != gpu:
        text = f"a worker of this server is on GPU {mine} and the weights are on GPU {gpu}, and ipc goes no further than one GPU"
        raise ValueError(f"{text}: take engine.weights='nccl', 'gloo' or 'files'")
    if way == "nccl" and mine == gpu:
        raise ValueError(f"server and learner share GPU {mine}, on which NCCL joins no two processes: take engine.weights='ipc' or 'files'")


def store_at(host: str, port: int, seconds: float) -> Any:
    """The sender's store."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


class Group:
    """Stands where vLLM's engine for NCCL has a communicator."""

    def __init__(self, way: str, host: str, port: int, rank: int, size: int, seconds: float) -> None:
        store, limit = dist.PrefixStore(way, store_at(host, port, seconds)), timedelta(seconds=seconds)
        if way == "nccl":
            self.group: Any = dist.ProcessGroupNCCL(store, rank, size, timeout=limit)
        elif "GLOO_SOCKET_IFNAME" in os.environ:
            self.group = dist.ProcessGroupGloo(store, rank, size, timeout=limit)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(hostname=address_towards(host, port))], limit
            self.group = dist.ProcessGroupGloo(store, rank, size, options)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        """Fill a tensor with what rank `src` has."""
        how = dist.BroadcastOptions()
        how.rootRank, how.rootTensor = src, 0
        self.group.broadcast([tensor], how).wait()

    def destroy(self) -> None:
        """Leave."""
        self.group = None


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another one."""
    with socket.create_connection((host, port), 10) as reached:
        return str(reached.getsockname()[0])


class Broadcasts:
    """Buckets that rank 0 broadcasts, read by vLLM's engine for NCCL."""

    def __init__(self, engine: Any, way: str, join: dict[str, Any]) -> None:
        device = engine.device if way == "nccl" else torch.device("cpu")
        settings = {"packed": True, "packed_buffer_size_bytes": int(join["bucket"]), "model_update_group": None}
        self.inner = reader(NCCLWeightTransferEngine, engine, device, settings)
        self.group = Group(way, join["host"], join["port"], rank_of(engine), join["size"], join["seconds"])
        self.group.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), 0)  # NCCL connects by its first
        self.inner.model_update_group = self.group

    def receive(self, load: Load, tensors: Sequence[Any], more: dict[str, Any]) -> None:
        """All tensors, (name, dtype, shape) each, in the order in which they come."""
        self.inner.model = SimpleNamespace(load_weights=load)
        names, dtypes, shapes = map(list, zip(*tensors, strict=True))
        with streams():
            self.inner.receive_weights(NCCLWeightTransferUpdateInfo(names, dtypes, shapes))

    def close(self) -> None:
        self.group.destroy()


class Shared:
    """Buckets that lie in memory of the sender's GPU, read by vLLM's engine for CUDA IPC."""

    def __init__(self, engine: Any, way: str, join: dict[str, Any]) -> None:
        self.inner, self.rank = reader(IPCWeightTransferEngine, engine, engine.device, {"packed": True}), rank_of(engine)
        self.store = dist.PrefixStore(way, store_at(join["host"], join["port"], join["seconds"]))

    def receive(self, load: Load, tensors: Sequence[Any], more: dict[str, Any]) -> None:
        """The same, `more["counts"]` of them in each bucket; the sender is told of each that was read, and says when the next lies there."""
        self.inner.model = SimpleNamespace(load_weights=load)
        left, handle = list(tensors), handle_of(more["handle"])
        try:
            for turn, count in enumerate(more["counts"]):
                names, dtypes, shapes = map(list, zip(*left[:count], strict=True))
                left = left[count:]
                sizes = [torch.Size(shape).numel() * getattr(torch, dtype).itemsize for dtype, shape in zip(dtypes, shapes, strict=True)]
                self.store.wait([f"{more['key']}/{turn}"])
                self.inner.receive_weights(IPCWeightTransferUpdateInfo(names, dtypes, shapes, {more["gpu"]: handle}, tensor_sizes=sizes))
                torch.accelerator.synchronize()
                self.store.set(f"{more['key']}/{turn}/{self.rank}", "")
        finally:
            self.inner.shutdown()

    def close(self) -> None:
        self.store = None


def opened(engine: Any, way: str, join: dict[str, Any]) -> Broadcasts | Shared:
    """A worker's end of a way for weights; waits for the others."""
    return (Shared if way == "ipc" else Broadcasts)(engine, way, join)


def reader(kind: type[Any], engine: Any, device: torch.device, settings: dict[str, Any]) -> Any:
    """One of vLLM's own engines of weight transfer, set up; ValueError where this vLLM's has not what is to be set."""
    import vllm

    inner = kind(engine.config, engine.vllm_config, device, SimpleNamespace())
    if unknown := [name for name in settings if not hasattr(inner, name)]:
        text = f"the {kind.__name__} of vLLM {vllm.__version__} has no {unknown[0]}, so it is not the one that is known here"
        raise ValueError(f"{text}: take engine.weights='files'")
    for name, value in settings.items():
        setattr(inner, name, value)
    return inner


def rank_of(engine: Any) -> int:
    """A worker's place in the group, from 1 on."""
    parallel = engine.vllm_config.parallel_config
    return 1 + int(parallel.data_parallel_index * parallel.world_size + parallel.rank)


class Still:
    """A stream of a machine that has one order alone."""

    def synchronize(self) -> None:
        """All is done."""


@contextmanager
def streams() -> Iterator[None]:
    """vLLM's reader of buckets orders them by CUDA streams: without CUDA it is given some that need not wait."""
    if torch.cuda.is_available():
        yield
        return
    stands: list[tuple[Any, str, Any]] = [
        (packed_tensor, "_get_streams", lambda device, count: (Still(),) * count),
        (torch.cuda, "stream", nullcontext),
        (torch.accelerator, "current_device_index", lambda: 0),
    ]
    former = [(place, name, getattr(place, name)) for place, name, _ in stands]
    try:
        for place, name, stand in stands:
            setattr(place, name, stand)
        yield
    finally:
        for place, name, was in former:
            setattr(place, name, was)


def handle_of(plain: Sequence[Any]) -> tuple[Any, ...]:
    """What torch rebuilds a tensor of another process from, of JSON; ValueError for anything that is not named in TYPES."""
    found: list[Any] = []
    for part in plain:
        match part:
            case {"bytes": text}:
                found.append(base64.b64decode(text))
            case {"size": sizes}:
                found.append(torch.Size(int(size) for size in sizes))
            case {"dtype": name} if isinstance(getattr(torch, name, None), torch.dtype):
                found.append(getattr(torch, name))
            case {"type": name} if name in TYPES:
                found.append(TYPES[name])
            case None | bool() | int():
                found.append(part)
            case _:
                raise ValueError(f"{str(part)[:80]} is no part of a handle: install the same ramulus and torch on both sides")
    return tuple(found)
