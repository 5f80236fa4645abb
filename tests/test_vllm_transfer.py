"""Weights that go straight into real vLLM servers by gloo: the same tokens as by files, the same guarantees; and as much of IPC as a CPU allows."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from conformance.subjects import forward_of, scratch
from placed import placed
from ramulus.engine.engine import Live, Request, Sampling, Segment
from ramulus.engine.vllm import transfer
from ramulus.engine.vllm.factory import Vllm
from ramulus.engine.vllm.process import Process
from ramulus.engine.vllm.vllm_engine import VllmEngine
from ramulus.engine.weight_bytes import to_bytes
from test_engine_vllm import LONG, apart, whole_forward
from test_vllm_killed import LONG as CROWD
from test_vllm_killed import same
from test_vllm_plugin import there
from test_vllm_training import grown, process, train
from vllm_servers import NEEDS, engine_at, process_of

__all__ = ["process"]
pytestmark = NEEDS


def ours(**options: Any) -> tuple[VllmEngine, Process]:
    """An engine that sends straight and may start its server again; buckets are small, so that there are many."""
    server = process_of("killed", scratch(0, 64)[0])
    engine = engine_at(server, ours=True, weights="gloo", **options)
    for sender in engine._senders.values():
        sender.bucket = 5000
    return engine, server


def test_what_is_sampled_is_sampled_by_the_weights_that_were_sent(tmp_path: Path) -> None:
    models = [scratch(seed, 64)[0] for seed in (0, 1)]
    request = Request(LONG, Sampling(4), seed=5)
    (tmp_path / "file.safetensors").write_bytes(to_bytes(models[0].state_dict()))

    async def story() -> None:
        engine, _ = ours()
        for version, place in enumerate((0, 1, 0, 1)):
            await engine.load(models[place].state_dict(), version)
            for _ in range(2):
                [segment] = await engine.sample([request])
                assert segment.version == version
                assert apart(forward_of(models[place]), LONG, segment.tokens, segment.logprobs) < 2e-5
        assert engine.counters()["reused"] == 4 * 256
        await engine.load(tmp_path / "file.safetensors", 7)  # files go on being read
        [segment] = await engine.sample([request])
        assert apart(forward_of(models[0]), LONG, segment.tokens, segment.logprobs) < 2e-5
        await engine.load(models[1].state_dict(), 8)
        assert (await engine.sample([request]))[0].version == 8

    asyncio.run(story())


def test_weights_go_straight_into_the_server_below_a_sampler() -> None:
    """What is said in between goes by way of the sampler; one that takes its place greets the same server and is given them again."""
    models = [scratch(seed, 64)[0] for seed in (0, 1)]
    server = process_of("killed", models[0])
    factory = Vllm(urls=(server.url,), key=server.key, weights="gloo")
    engine, here = placed(models[0], 1, 300.0, factory=factory, sender=factory.traits.sender)

    async def story() -> None:
        await engine.load(dict(models[1].state_dict()), 3)
        for _ in range(2):
            [segment] = await engine.sample([Request(LONG, Sampling(4), seed=5)])
            assert segment.version == 3
            assert apart(forward_of(models[1]), LONG, segment.tokens, segment.logprobs) < 2e-5
            here.lost["sample"] = 0

    with pytest.warns(UserWarning, match="another is started in its place"):
        asyncio.run(story())
    assert len(here.started) == 2


def test_weights_that_lack_something_are_refused_before_anything_is_changed() -> None:
    engine, server = ours()
    first, second = scratch(0, 64)[0].state_dict(), scratch(1, 64)[0].state_dict()
    lacking = {name: tensor for name, tensor in second.items() if "layers.1" not in name}

    async def story() -> None:
        await engine.load(first, 5)
        undisturbed, began = await engine.sample(CROWD), server.running
        for weights, said in ((lacking, "are missing, new"), (scratch(1, 128)[0].state_dict(), "of another shape")):
            with pytest.raises(ValueError, match=said):
                await engine.load(weights, 6)
            assert same(await engine.sample(CROWD), undisturbed), "the old ones are there"
        [one] = engine.servers
        for way in ("nccl", "ipc", "rdma"):
            with pytest.raises(ValueError, match=r"computes on a CPU, and|takes no weights by 'rdma'"):
                await one.ask(engine._here.client, "POST", "fits", {"way": way, "gpu": "GPU-1", "tensors": []})
        assert same(await engine.sample(CROWD), undisturbed)
        assert server.running is began, "without a restart"
        await engine.load(second, 6)
        assert {segment.version for segment in await engine.sample(CROWD)} == {6}

    asyncio.run(story())


@pytest.mark.parametrize(("moment", "number"), [(0, signal.SIGKILL), (3, signal.SIGKILL), (3, signal.SIGSTOP)])
def test_one_that_is_lost_while_weights_are_on_their_way_gets_them_again(moment: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies, or hangs, at the first bucket or at the fourth; the second time it is told of them by the same way."""
    engine, server = ours(timeout=20.0 if number == signal.SIGSTOP else 120.0)
    real, carried = transfer.packed_into, list[int]()

    def packed_into(buffer: Any, bucket: Any) -> Any:
        carried.append(len(bucket))
        if len(carried) == moment + 1:
            assert server.running is not None
            os.killpg(server.running.pid, number)
        return real(buffer, bucket)

    async def story() -> None:
        await engine.load(scratch(1, 64)[0].state_dict(), 5)
        wanted = [list(segment.tokens) for segment in await engine.sample(CROWD)]
        await engine.load(scratch(0, 64)[0].state_dict(), 6)
        monkeypatch.setattr(transfer, "packed_into", packed_into)
        await engine.load(scratch(1, 64)[0].state_dict(), 7)
        segments = await engine.sample(CROWD)
        assert [list(segment.tokens) for segment in segments] == wanted
        assert {segment.version for segment in segments} == {7}
        assert len(carried) > 2 * moment + 1

    with pytest.warns(UserWarning, match="it is started again"):
        asyncio.run(story())


def test_one_that_is_lost_after_its_weights_were_learned_further_waits_for_the_next() -> None:
    engine, server = ours()
    model, now = scratch(1, 64)[0], [5]

    async def story() -> None:
        await engine.load(Live(model.state_dict(), lambda: now[0]), 5)
        await engine.sample(CROWD)
        assert server.running is not None
        os.killpg(server.running.pid, signal.SIGKILL)
        now[0] = 6
        with pytest.raises(ConnectionError, match="wants weights that have been learned further since they were loaded: load weights again"):
            await engine.sample(CROWD)
        await engine.load(Live(model.state_dict(), lambda: now[0]), 6)
        assert {segment.version for segment in await engine.sample(CROWD)} == {6}

    with pytest.warns(UserWarning, match="it is started again"):
        asyncio.run(story())


def test_weights_are_swapped_in_flight() -> None:
    models = [scratch(seed, 64)[0] for seed in (0, 1)]
    asked = [Request((1, 2, 3 + i % 5), Sampling(500), seed=i) for i in range(8)]

    async def story() -> list[Segment]:
        engine, _ = ours(in_flight=True)
        await engine.load(models[0].state_dict(), 4)
        flying = asyncio.ensure_future(engine.sample(asked))
        await asyncio.sleep(0.4)
        assert not flying.done()
        await engine.load(models[1].state_dict(), 5)
        return await flying

    segments = asyncio.run(story())
    assert {(s.version, s.newest) for s in segments} == {(4, 5)}
    plain = [whole_forward(model) for model in models]
    for request, segment in zip(asked, segments, strict=True):
        assert segment.versions is not None
        logprobs = [rows([*request.prefix, *segment.tokens]) for rows in plain]
        for i, (token, version) in enumerate(zip(segment.tokens, segment.versions, strict=True)):
            assert float(logprobs[version - 4][len(request.prefix) - 1 + i, token]) == pytest.approx(segment.logprobs[i], abs=1e-4)


@pytest.mark.usefixtures("process")
def test_a_run_grows_the_same_trees_as_with_files(tmp_path: Path) -> None:
    rows = train("grpo", tmp_path / "straight", "engine.weights=gloo")
    assert sum(row["updates"] for row in rows) >= 2
    assert all(row["mismatch_max"] < 1e-4 for row in rows)
    train("grpo", tmp_path / "files")
    assert grown(tmp_path / "straight") == grown(tmp_path / "files")


READS = """
import base64, json, sys, threading
from types import SimpleNamespace
import torch
from vllm.distributed.weight_transfer import base, ipc_engine, packed_tensor
from ramulus_vllm import transfer

asked = json.load(sys.stdin)
whole = base64.b64decode(asked["bytes"])
refused = []
for wrong in ([{"type": "Popen"}], [{"dtype": "nn"}], ["text"], [{"bytes": "AA==", "more": {}}, 1.5]):
    try:
        transfer.handle_of(wrong)
    except ValueError as error:
        refused.append(str(error))

class Store:  # of the sender, who lays the next bucket into the buffer once the last one was read
    def __init__(self):
        self.buffer, self.turn = torch.zeros(len(whole), dtype=torch.uint8), 0
    def wait(self, keys):
        start, end = asked["edges"][self.turn], asked["edges"][self.turn + 1]
        assert keys == [f"name/{self.turn}"]
        self.buffer[: end - start] = torch.frombuffer(bytearray(whole[start:end]), dtype=torch.uint8)
    def set(self, key, value):
        assert key == f"name/{self.turn}/1"
        self.buffer.zero_()
        self.turn += 1

store, got = Store(), {}
rebuilt = []
def rebuild(*parts):  # what CUDA maps
    rebuilt.append(parts)
    return store.buffer
import torch.multiprocessing.reductions as reductions
reductions.rebuild_cuda_tensor = rebuild
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="GPU-1")
torch.accelerator.synchronize = lambda: None
parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
config = SimpleNamespace(parallel_config=parallel, model_config=None)
engine = SimpleNamespace(config=None, vllm_config=config, device=SimpleNamespace(index=3, type="cuda"))
transfer.store_at = lambda *where: None
transfer.dist = SimpleNamespace(PrefixStore=lambda way, at: store)
shared = transfer.Shared(engine, "ipc", {"host": "", "port": 0, "seconds": 1})
try:
    transfer.reader(transfer.IPCWeightTransferEngine, engine, engine.device, {"packing": True})
except ValueError as error:
    assert "has no packing, so it is not the one that is known here" in str(error)
else:
    raise AssertionError
def load(some):
    got.update({name: tensor for name, tensor in some})
shared.receive(load, asked["tensors"], {"key": "name", "gpu": "GPU-1", "counts": asked["counts"], "handle": asked["handle"]})
assert len({id(parts) for parts in rebuilt}) == 1 and rebuilt[0][6] == 3 and rebuilt[0][4] is torch.storage.TypedStorage and rebuilt[0][7] == b"h"
print(json.dumps([{name: tensor.double().tolist() for name, tensor in got.items()}, refused]))
"""


def test_buckets_in_shared_memory_are_read_by_vllm_s_engine_for_ipc() -> None:
    """Without a GPU: its mapping of memory and the sender's store are stood in for, all else is what runs."""
    import base64

    import torch

    new = transfer.held_weights(scratch(0)[0].state_dict() | {"half": torch.arange(6.0).bfloat16().view(2, 3)}, 0)
    cut = list(transfer.buckets(new.tensors, 5000))
    parts = [bytes(transfer.packed_into(torch.empty(2**20, dtype=torch.uint8), bucket).numpy()) for bucket in cut]
    edges = [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
    handle = (torch.Tensor, torch.Size([2**20]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, b"h", 2**20, 0, False, b"r", 0, b"e", True)
    asked = {
        "bytes": base64.b64encode(b"".join(parts)).decode(), "edges": edges, "tensors": transfer.manifest(new.tensors),
        "counts": [len(bucket) for bucket in cut], "handle": transfer.plain_handle(handle),
    }  # fmt: skip
    assert len(cut) > 3
    got, refused = there(READS, asked)
    assert got == {name: tensor.double().tolist() for name, tensor in new.tensors.items()}
    assert len(refused) == 4
    assert all("is no part of a handle" in text for text in refused)
