"""Weights on their way into a vLLM server without a file, this process's side: buckets, what they are cut from, groups, what is refused."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conformance.subjects import scratch
from misbehaving import Misbehaving, misbehaving
from ramulus import Vllm
from ramulus.engine.engine import Live
from ramulus.engine.pool import Lost
from ramulus.engine.vllm.server import Server, greeting_of
from ramulus.engine.vllm.transfer import (
    Sender,
    address_towards,
    buckets,
    held_weights,
    joined_group,
    laid,
    manifest,
    packed_into,
    plain_handle,
    refuse_way,
)
from ramulus.engine.vllm.vllm_engine import VllmEngine
from ramulus.learn.policy.in_process import InProcess
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.native.meeting import store_on
from ramulus.run.config.resume import build
from tiny import build as tiny


def read(data: torch.Tensor, listed: list[Any]) -> dict[str, torch.Tensor]:
    """Tensors of the bytes of a bucket, as vLLM's reader takes them."""
    sizes = [torch.Size(shape).numel() * getattr(torch, dtype).itemsize for _, dtype, shape in listed]
    parts = data.split(sizes)
    return {name: part.view(getattr(torch, dtype)).view(shape) for (name, dtype, shape), part in zip(listed, parts, strict=True)}


@pytest.mark.parametrize("size", [1, 1000, 5000, 2**28])
def test_buckets_hold_every_tensor_once_in_the_order_of_the_model(size: int) -> None:
    state = scratch(0)[0].state_dict()
    new = held_weights(state, 3)
    assert new.version == 3
    assert list(new.tensors) == [name for name in state if name in new.tensors]
    assert len(new.tensors) == len({t.data_ptr() for t in state.values()}), "tied ones once"
    left, told = manifest(new.tensors), {}
    cut = list(buckets(new.tensors, size))
    assert all(sum(t.nbytes for t in bucket[:-1]) <= size for bucket in cut)
    assert all(sum(t.nbytes for t in bucket) > size for bucket in cut[:-1]), "full but for the last"
    buffer = torch.empty(max(sum(t.nbytes for t in bucket) for bucket in cut), dtype=torch.uint8)
    for bucket in cut:
        told |= {name: tensor.clone() for name, tensor in read(packed_into(buffer, bucket), left[: len(bucket)]).items()}
        left = left[len(bucket) :]
    assert not left
    assert all(torch.equal(told[name], new.tensors[name]) for name in new.tensors)


@pytest.mark.parametrize("shapes", [((3,), (5, 2)), ((), (2, 2)), ((4, 3), (3, 4))])
def test_numbers_of_several_widths_lie_where_they_can_be_read(shapes: tuple[Any, ...]) -> None:
    kinds = [torch.bfloat16, torch.float32, torch.int8, torch.float64, torch.bool]
    whole = {f"{kind}{i}": torch.ones(shape).to(kind) for kind in kinds for i, shape in enumerate(shapes)}
    whole["across"] = torch.arange(12.0).view(3, 4).t()
    new = held_weights(whole, 0)
    assert set(new.tensors) == set(whole)
    [bucket] = buckets(new.tensors, 2**20)
    assert all(at % tensor.element_size() == 0 for at, tensor in laid(bucket))
    told = read(packed_into(torch.empty(2**12, dtype=torch.uint8), bucket), manifest(new.tensors))
    assert all(torch.equal(told[name], whole[name]) for name in whole)


def test_weights_that_were_learned_further_are_seen_to_be_others() -> None:
    policy = TorchPolicy(tiny())
    one = InProcess(policy)
    new = held_weights(Live(asyncio.run(one.weights(live=True)), lambda: one.version), 0)  # type: ignore[arg-type]
    kept = held_weights(asyncio.run(one.weights()), 0)  # type: ignore[arg-type]
    assert not new.changed
    assert {t.data_ptr() for t in new.tensors.values()} <= {p.data_ptr() for p in policy.model.state_dict().values()}, "no copy"
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    policy.update(1e-3)
    assert new.changed
    assert not kept.changed
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(kept.tensors[name], new.tensors[name]), "what nobody watches over is a copy"


def test_what_a_gpu_alone_can_send_is_refused_without_one() -> None:
    for way in ("nccl", "ipc"):
        with pytest.raises(ValueError, match=f"engine.weights='{way}' sends from a GPU, and the learner is on the cpu: take engine.weights='gloo'"):
            Vllm(weights=way)(scratch(0)[0])  # type: ignore[arg-type]
        refuse_way(way, "cuda")
    with pytest.raises(ValueError, match=r"engine\.weights is 'files', 'gloo', 'nccl' or 'ipc', got 'rdma'"):
        Vllm(weights="rdma")  # type: ignore[arg-type]
    [run], _ = build(str(Path(__file__).parent / "run_vllm.py") + ":grpo", ["engine.weights=gloo"])
    assert run.engine.weights == "gloo"


def test_an_older_plug_in_is_named() -> None:
    with misbehaving(1) as [server]:
        one = Server(server.url, "", 5.0)
        one.meet(False, 1.0)
        for version, words in (("0.32.0", "install vllm-plugin/"), ("0.31.0", "take vLLM 0.32 or newer")):
            server.greeting = {"vllm": version}
            one.meet(False, 1.0)
            with pytest.raises(ValueError, match=f"takes no weights by gloo: {words}"):
                VllmEngine([one], Path(), weights="gloo")


def test_a_handle_is_json_of_what_torch_says() -> None:
    handle = (torch.Tensor, torch.Size([7]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, b"\x00\xff", 512, 0, False, b"r", 3, b"e", True)
    told = plain_handle(handle)
    assert told[:3] == [{"type": "Tensor"}, {"size": [7]}, {"size": [1]}]
    assert told[4:8] == [{"type": "TypedStorage"}, {"dtype": "uint8"}, 0, {"bytes": "AP8="}]
    assert told[8:11] == [512, 0, False]


@contextmanager
def peer(at: Server) -> Iterator[tuple[Any, list[bytes]]]:
    """A group of two, this process's end of it and what the other end has got."""
    host = address_towards(at.url)
    port, store = store_on(host, 10.0)
    got: list[bytes] = []

    def other() -> None:
        there = dist.PrefixStore("gloo", dist.TCPStore(host, port, is_master=False, wait_for_workers=False))
        group = group_at(there)
        for size in (1, 5, 3):
            tensor = torch.empty(size, dtype=torch.uint8)
            group.broadcast([tensor]).wait()
            got.append(bytes(tensor.tolist()))

    thread = Thread(target=other)
    thread.start()
    yield joined_group("gloo", store, 2, host, 10.0), got
    thread.join()


def group_at(store: Any) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return dist.ProcessGroupGloo(store, 1, 2, options)


def test_a_group_is_on_the_address_by_which_the_server_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as room, peer(Server(f"http://127.0.0.1:{room.getsockname()[1]}", "", 5.0)) as (group, got):
        for values in ([9], [1, 2, 3, 4, 5], [6, 7, 8]):
            group.broadcast([torch.tensor(values, dtype=torch.uint8)]).wait()
    assert got == [b"\x09", b"\x01\x02\x03\x04\x05", b"\x06\x07\x08"]


@pytest.mark.parametrize("said", ["Connection closed by peer [127.0.0.1]:1", ""])
def test_a_connection_that_breaks_is_a_server_lost(said: str) -> None:
    sender = Sender("gloo", Server("http://127.0.0.1:9", "", 5.0))

    def breaks() -> None:
        raise RuntimeError(said)

    async def never() -> None:
        raise ValueError("the weights could not be taken")

    async def story(asking: Any, work: Any) -> Any:
        return await sender._both(asking, work)

    with pytest.raises(Lost, match=f"is lost while weights are on their way \\({(said or 'RuntimeError')[:20]}"):
        asyncio.run(story(asyncio.sleep(0.2), breaks))
    with pytest.raises(ValueError, match="could not be taken"):
        asyncio.run(story(never(), partial(time.sleep, 0.5)))


def test_of_shared_memory_each_bucket_is_read_before_the_next_is_laid_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of it, by a real store; what is waited for on a GPU is left out."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    state = scratch(0)[0].state_dict()
    new = held_weights(state, 0)
    cut = list(buckets(new.tensors, 1000))
    buffer = torch.zeros(2**16, dtype=torch.uint8)
    with socket.create_server(("127.0.0.1", 0)) as room:
        server = Server(f"http://127.0.0.1:{room.getsockname()[1]}", "", 5.0)
        host = address_towards(server.url)
        port, store = store_on(host, 10.0)
    server.hello = greeting_of(Misbehaving().hello() | {"workers": 2, "ways": ["files", "ipc"]}, server.url)
    sender, got = Sender("ipc", server), [bytearray(), bytearray()]
    sender.store = store

    def worker(rank: int) -> None:
        there = dist.PrefixStore("ipc", dist.TCPStore(host, port, is_master=False, wait_for_workers=False))
        for turn, bucket in enumerate(cut):
            there.wait([f"name/{turn}"])
            got[rank - 1] += bytes(buffer[: sum(t.nbytes for t in bucket)].numpy())
            there.set(f"name/{turn}/{rank}", "")

    threads = [Thread(target=worker, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    sender._carried(cut, buffer, partial(sender._laid_out, "name"))
    for thread in threads:
        thread.join()
    assert len(cut) > 3
    assert got[0] == got[1] == b"".join(bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in new.tensors.values())
