"""Weights that go into a vLLM server without a file: packed into buckets, which its workers get by gloo, by NCCL, or read by CUDA IPC.

What the server does with them is in `vllm-plugin/ramulus_vllm/transfer.py`. Each server has a group of its own with this process as rank 0, so that
one that is lost takes no other with it; of the weights one bucket at a time is held twice.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from ramulus.engine.engine import Live
from ramulus.engine.factory import Relay
from ramulus.engine.pool import Lost
from ramulus.engine.pushed import Held
from ramulus.engine.vllm.server import Greeting
from ramulus.models.errors import sentence
from ramulus.native.meeting import store_on

_T = TypeVar("_T")
BUCKET = 2**28  # bytes; a bucket is full with the tensor that brings it beyond
JOINING = 120.0  # seconds in which a server's workers must have joined
OF_GPUS = frozenset({"nccl", "ipc"})


def refuse_way(way: str, device: str) -> None:
    """Raise ValueError where a learner on such a device cannot send weights this way."""
    if way in OF_GPUS and device != "cuda":
        raise ValueError(f"engine.weights={way!r} sends from a GPU, and the learner is on the {device}: take engine.weights='gloo' or 'files'")


def held_weights(weights: Mapping[str, Any], version: int) -> Held:
    """The tensors of a state dict, tied ones once, in its order; where that would lay numbers across their own width, wide ones first.

    A learner's parameters stay where they are; of others, which somebody may change, a copy on the CPU is kept.
    """
    places, tensors = set[tuple[Any, ...]](), dict[str, Any]()
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.numel() or place not in places:
            places.add(place)
            tensors[name] = tensor.detach() if isinstance(weights, Live) else tensor.detach().to("cpu", copy=True)
    if any(at % tensor.element_size() for bucket in buckets(tensors, BUCKET) for at, tensor in laid(bucket)):
        tensors = dict(sorted(tensors.items(), key=lambda pair: -pair[1].element_size()))
    return Held(Path(), version, tensors=tensors, now=weights.version if isinstance(weights, Live) else lambda: version)


def buckets(tensors: Mapping[str, Any], size: int) -> Iterator[list[Any]]:
    """Tensors in order, cut where vLLM's reader cuts them: after the one that brings a bucket beyond `size` bytes."""
    bucket, full = list[Any](), 0
    for tensor in tensors.values():
        bucket.append(tensor)
        full += tensor.nbytes
        if full > size:
            yield bucket
            bucket, full = [], 0
    if bucket:
        yield bucket


def laid(bucket: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Where each tensor of a bucket begins, in bytes."""
    at = 0
    for tensor in bucket:
        yield at, tensor
        at += tensor.nbytes


def packed_into(buffer: Any, bucket: Sequence[Any]) -> Any:
    """The bytes of a bucket, one tensor after the other, in a buffer [bytes] that is large enough; the part of it that they take."""
    import torch

    end = 0
    for at, tensor in laid(bucket):
        end = at + tensor.nbytes
        buffer[at:end].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return buffer[:end]


def manifest(tensors: Mapping[str, Any]) -> list[list[Any]]:
    """Name, dtype and shape of each."""
    return [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]


def plain_handle(parts: Sequence[Any]) -> list[Any]:
    """What torch rebuilds a tensor of another process from, as JSON."""
    import torch

    def plain(part: Any) -> Any:
        if isinstance(part, bytes):
            return {"bytes": base64.b64encode(part).decode()}
        if isinstance(part, type):
            return {"type": part.__name__}
        if isinstance(part, torch.dtype):
            return {"dtype": str(part).removeprefix("torch.")}
        if isinstance(part, tuple | list):
            return {"size": [int(size) for size in part]}
        return part.index if isinstance(part, torch.device) else part

    return [plain(part) for part in parts]


class Receiver(Protocol):
    """A server, or what passes on to one."""

    hello: Greeting
    timeout: float  # seconds

    @property
    def url(self) -> str: ...

    async def ask(self, client: Any, method: str, path: str, content: Any = None, patience: float | None = None) -> Any:
        """The JSON of one of the plug-in's addresses."""
        ...


class Sender:
    """This process's end of the way into one server. `way`: "gloo", "nccl" or "ipc".

    `host`: this machine's address, as the server's workers reach it; "" is the one on the way to the server's.
    """

    def __init__(self, way: str, server: Receiver, host: str = "") -> None:
        self.way, self.server, self.host, self.bucket = way, server, host, BUCKET
        self.instance = ""  # of the server's process that is reached
        self.store: Any = None
        self.group: Any = None

    async def send(self, client: Any, new: Held, in_flight: bool) -> Any:
        """The server's word once it has the weights. ValueError where it refuses them, Lost where it or the connection breaks."""
        server, listed = self.server, manifest(new.tensors)
        greeting = await server.ask(client, "GET", "hello")
        if greeting["loaded"] == new.name:  # it was lost for a while: sent again, they would wait for nobody
            return greeting
        device = self._device(new.tensors)
        gpu = uuid_of(device)
        await server.ask(client, "POST", "fits", {"way": self.way, "gpu": gpu, "tensors": listed})
        if self.instance != server.hello.instance:
            await self._open(client, device, gpu)
        cut = list(buckets(new.tensors, self.bucket))
        buffer = _room(max(sum(tensor.nbytes for tensor in bucket) for bucket in cut), device)
        more = {} if self.way != "ipc" else self._shared(buffer, gpu, new.name) | {"counts": [len(bucket) for bucket in cut]}
        body = {"instance": self.instance, "name": new.name, "version": new.version, "in_flight": in_flight, "tensors": listed, "more": more}
        carry = self._laid_out if self.way == "ipc" else self._broadcast
        greeting = await self._both(server.ask(client, "POST", "load", body), partial(self._carried, cut, buffer, partial(carry, new.name)))
        if self.way == "ipc":
            _give_back()
        return greeting

    def _device(self, tensors: Mapping[str, Any]) -> Any:
        """The device on which buckets are packed."""
        import torch

        if self.way not in OF_GPUS:
            return torch.device("cpu")
        refuse_way(self.way, "cuda" if torch.cuda.is_available() else "cpu")
        return next((t.device for t in tensors.values() if t.is_cuda), torch.device("cuda", torch.cuda.current_device()))

    async def _open(self, client: Any, device: Any, gpu: str) -> None:
        """Have the server's workers join."""
        self.close()
        server, seconds = self.server, min(self.server.timeout, JOINING)
        host = self.host or address_towards(server.url)
        port, self.store = store_on(host, seconds)
        size = 1 + server.hello.workers
        join = {"host": host, "port": port, "size": size, "seconds": server.timeout, "bucket": self.bucket}
        body = {"instance": server.hello.instance, "way": self.way, "gpu": gpu, "join": join}
        await self._both(server.ask(client, "POST", "open", body, seconds), partial(self._joined, host, size, device))
        self.instance = server.hello.instance

    def _joined(self, host: str, size: int, device: Any) -> None:
        """Make the group; NCCL connects by its first broadcast."""
        import torch

        if self.way == "ipc":
            return
        self.group = joined_group(self.way, self.store, size, host, self.server.timeout)
        self.group.broadcast([torch.zeros(1, dtype=torch.uint8, device=device)]).wait()

    async def _both(self, asking: Coroutine[Any, Any, _T], work: Callable[[], None]) -> _T:
        """What the server answers while this process does its part. What the server says comes first; Lost where the part alone fails."""
        answer, working = asyncio.ensure_future(asking), in_daemon(work)
        both: set[asyncio.Future[Any]] = {answer, working}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            if not working.done() or (failed := working.exception()) is None:
                return await answer
            self.close()  # so that the server need not wait
            await asyncio.wait({answer}, timeout=30.0)
            if answer.done() and isinstance(answer.exception(), Lost):
                await answer
            raise Lost(f"the vLLM server at {self.server.url} is lost while weights are on their way ({sentence(failed)[:200]})")
        except BaseException:
            self.close()
            answer.cancel()
            raise

    def _carried(self, cut: Sequence[Sequence[Any]], buffer: Any, carry: Callable[[int, Any], None]) -> None:
        """Every bucket, one after the other, through one buffer."""
        for turn, bucket in enumerate(cut):
            carry(turn, packed_into(buffer, bucket))

    def _broadcast(self, name: str, turn: int, data: Any) -> None:
        self.group.broadcast([data]).wait()

    def _laid_out(self, name: str, turn: int, data: Any) -> None:
        """Let the workers read a bucket, and wait until all have."""
        import torch

        torch.cuda.synchronize(data.device)
        self.store.set(f"ipc/{name}/{turn}", "")  # what a PrefixStore of "ipc" calls it
        self.store.wait([f"ipc/{name}/{turn}/{rank}" for rank in range(1, 1 + self.server.hello.workers)], timedelta(seconds=self.server.timeout))

    def _shared(self, buffer: Any, gpu: str, name: str) -> dict[str, Any]:
        """What the workers find a buffer by."""
        from torch.multiprocessing.reductions import reduce_tensor

        return {"gpu": gpu, "key": name, "handle": plain_handle(reduce_tensor(buffer)[1])}

    def close(self) -> None:
        """Leave the group; whoever waits in it is told."""
        group, self.group, self.store, self.instance = self.group, None, None, ""
        if group is not None and self.way == "nccl":
            with suppress(RuntimeError):
                group.abort()


class Relayed:
    """A driver's end of the way into the one vLLM server of a sampler, which passes on what is asked of its server."""

    def __init__(self, way: str, relay: Relay, host: str, timeout: float) -> None:
        self.relay, self.timeout, self.url = relay, timeout, ""
        self.hello: Greeting
        self.sender = Sender(way, self, host)

    async def ask(self, client: Any, method: str, path: str, content: Any = None, patience: float | None = None) -> Any:
        """The JSON of one of the plug-in's addresses."""
        return await self.relay(method, path, content, patience)

    def hold(self, weights: Mapping[str, Any], version: int) -> Held:
        """The weights as they are sent."""
        return held_weights(weights, version)

    async def send(self, new: Held, in_flight: bool) -> Any:
        """The server's word once it has the weights; which server it is now is asked first."""
        self.url, self.hello = await self.relay()
        return await self.sender.send(None, new, in_flight)

    def close(self) -> None:
        """Leave the group."""
        self.sender.close()


def _room(size: int, device: Any) -> Any:
    """An empty buffer of `size` bytes on a device."""
    import torch

    return torch.empty(size, dtype=torch.uint8, device=device)


def _give_back() -> None:
    """Have torch free what other processes of the GPU have read and left."""
    import torch

    torch.cuda.ipc_collect()


def uuid_of(device: Any) -> str:
    """The UUID of a GPU; "" for another device."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def address_towards(url: str) -> str:
    """The one address of this machine by which the server at `url` is reached."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)), 10) as reached:
        return str(reached.getsockname()[0])


def joined_group(way: str, store: Any, size: int, host: str, seconds: float) -> Any:
    """A group of torch with this process as rank 0, which gloo reaches at `host` alone unless GLOO_SOCKET_IFNAME says otherwise."""
    import torch.distributed

    dist: Any = torch.distributed  # what groups are made with is not all declared
    store, limit = dist.PrefixStore(way, store), timedelta(seconds=seconds)
    if way == "nccl":
        with blocking():
            return dist.ProcessGroupNCCL(store, 0, size, timeout=limit)
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return dist.ProcessGroupGloo(store, 0, size, timeout=limit)
    options = dist.ProcessGroupGloo._Options()
    options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(hostname=host)], limit
    return dist.ProcessGroupGloo(store, 0, size, options)


@contextmanager
def blocking() -> Iterator[None]:
    """A group of NCCL that is made inside raises where a peer is lost, and does not end the process."""
    former = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCH_NCCL_BLOCKING_WAIT")
        if former is not None:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = former


def in_daemon(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """What `work` answers, in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # not every failure is waited for

    def settle_soon(settle: Callable[[Any], None], what: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if future.done() else settle(what))

    def run() -> None:
        try:
            answer = work()
        except BaseException as error:
            settle_soon(future.set_exception, error)
        else:
            settle_soon(future.set_result, answer)

    Thread(target=run, name="weights", daemon=True).start()
    return future
