"""A run's cluster without Ray: what is refused and in which words, what is reserved where, and samplers that are lost, hang, sleep."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import run_recipe
from conformance.subjects import scratch
from engines import KERNELS
from placed import placed
from ramulus import Local, Ray, Remote, Sharded, Vllm
from ramulus.engine.around import AroundEngine
from ramulus.engine.engine import Request, Sampling, Segment, StopRule
from ramulus.engine.factory import EngineTraits
from ramulus.engine.pool import Lost
from ramulus.engine.pushed import Held
from ramulus.engine.weight_bytes import state_of_bytes, to_bytes
from ramulus.learn.sharded.starting import serve_at
from ramulus.run.cluster import connected
from ramulus.run.config.resume import build
from ramulus.run.placed_engine import PlacedEngine
from ramulus.run.ray_carrier import RayCarrier
from ramulus.run.sampler import versions

CROWD = [Request((1, 2, 3 + i % 5), Sampling(4 + i), StopRule(frozenset({1})), seed=i) for i in range(9)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"samplers": 0}, "cluster.samplers must be at least 1, got 0"),
        ({"trainers": 0}, "cluster.trainers must be at least 1, got 0"),
        ({"ahead": -1}, "cluster.ahead must be at least 0, got -1"),
        ({"cpus": float("nan")}, "cluster.cpus must be at least 0, got nan"),
        ({"cpus": 0}, "a sampler needs something: set cluster.cpus or cluster.gpus above 0"),
        ({"trainers": 2, "trainer_cpus": 0}, "a trainer needs something"),
        *[
            ({name: seconds}, "cluster.timeout and cluster.patience must be above 0 and at most 1e[+]09 seconds, got ")
            for name in ("timeout", "patience")
            for seconds in (0, -1.0, math.nan, math.inf)
        ],
        ({"address": "ray://head:10001"}, "goes by Ray's client"),
        ({"address": "head"}, "cluster.address='head' is no address: write HOST:PORT"),
        ({"address": "127.0.0.1:637900"}, "cluster.address='127.0.0.1:637900' is no address: write HOST:PORT"),
        ({"address": "head:0"}, "cluster.address='head:0' is no address: write HOST:PORT"),
        ({"weights": "nccl"}, "cluster.weights is 'objects', 'files' or 'direct', got 'nccl'"),
        ({"colocated": True, "ahead": 1}, "grow nothing ahead"),
        ({"colocated": True, "gpus": 1, "samplers": 3}, "as many samplers as trainers, got 3 and 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Ray(**fields)


def test_a_run_and_its_cluster_go_together() -> None:
    run = run_recipe.rl()
    with pytest.raises(ValueError, match="are ranks of a learner over many processes: set learner=sharded"):
        replace(run, cluster=Ray(trainers=2))
    with pytest.raises(ValueError, match=r"leave learner\.ranks out"):
        replace(run, cluster=Ray(trainers=2), learner=Sharded(ranks=3))
    with pytest.raises(ValueError, match=r"engine\.weights='nccl' goes from the learner to servers, but with a cluster"):
        replace(run, cluster=Ray(), engine=Vllm(weights="nccl"))
    direct = Ray(weights="direct")
    for engine in (Local(), Vllm(), Vllm(weights="ipc")):
        with pytest.raises(ValueError, match=r"goes from the learner straight into vLLM servers by engine\.weights: take engine=Vllm"):
            replace(run, cluster=direct, engine=engine)
    with pytest.raises(ValueError, match=r"one vLLM server for a sampler: set cluster\.samplers"):
        replace(run, cluster=direct, engine=Vllm(weights="gloo", servers=2))
    for engine, named in ((Remote("http://127.0.0.1:1/"), "url"), (Vllm(urls=("http://127.0.0.1:1",)), "urls")):
        with pytest.raises(ValueError, match=rf"cluster\.samplers=2 would all load their weights into the servers of engine\.{named}, each against"):
            replace(run, cluster=Ray(samplers=2), engine=engine)
        assert replace(run, cluster=Ray(), engine=engine).engine == engine
    assert replace(run, cluster=direct, engine=Vllm(weights="nccl")).cluster == direct
    assert replace(run, cluster=Ray(trainers=2), learner=Sharded()).cluster == Ray(trainers=2)


def test_the_command_line_says_ray_and_its_fields() -> None:
    recipe = f"{Path(run_recipe.__file__)}:rl"
    for words in (["cluster=ray", "cluster.samplers=2"], ["cluster=Ray()", "cluster.samplers=2"], ["cluster.samplers=2"]):
        [run], _ = build(recipe, words)
        assert run.cluster == Ray(samplers=2)
    assert build(recipe, ["cluster=none"])[0][0].cluster is None
    with pytest.raises(ValueError, match="there is no cluster 'slurm': there is ray"):
        build(recipe, ["cluster=slurm"])


def test_what_is_reserved_where() -> None:
    assert Ray().bundles() == ([{"CPU": 1.0}], [{"CPU": 1.0}])
    apart = Ray(samplers=3, cpus=4, gpus=2, trainers=2, trainer_gpus=1)
    assert apart.bundles() == ([{"CPU": 1.0, "GPU": 1.0}] * 2, [{"CPU": 4.0, "GPU": 2.0}] * 3)
    assert apart.total() == {"CPU": 14.0, "GPU": 8.0}
    assert apart.share(2) == 2
    together = Ray(samplers=2, gpus=1, trainers=2, trainer_gpus=1, colocated=True)
    assert together.bundles() == ([{"CPU": 2.0, "GPU": 1.0}] * 2, [])
    assert together.share(1) == 0.5, "sampler and trainer see one GPU"
    assert Ray(samplers=3, trainers=2, colocated=True).bundles() == ([{"CPU": 3.0}, {"CPU": 2.0}], [])


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'cluster=Ray\(...\) needs ray: pip install "ramulus\[ray\]", the same version on all machines'):
        connected(Ray()).__enter__()
    with connected(None):
        pass


@pytest.mark.parametrize("name", ["OutOfMemoryError", "WorkerCrashedError", "ActorDiedError"])
def test_a_sampler_that_ray_or_somebody_else_ends_is_lost_and_not_a_failure(name: str) -> None:
    ray = pytest.importorskip("ray")
    kind = getattr(ray.exceptions, name)
    told = kind("Task was killed due to the node running low on memory. More\nand more") if name == "OutOfMemoryError" else kind()
    with pytest.raises(Lost) as caught, RayCarrier(ray, lambda place: {}, b"", None, "")._told():
        raise told
    assert "\n" not in str(caught.value)


def test_an_address_where_nobody_listens_is_named() -> None:
    with socket.socket() as room:
        room.bind(("127.0.0.1", 0))
        port = room.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"no Ray cluster answers at cluster.address=127.0.0.1:{port}"):
        connected(Ray(address=f"127.0.0.1:{port}")).__enter__()


def test_a_machine_with_other_versions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramulus.run.placed_engine.versions", lambda: versions() | {"torch": "2.0.0"})
    with pytest.raises(ConnectionError, match=r"sampler 0 \(process .*\) has torch .* and here 2\.0\.0: install the same on all machines"):
        placed(scratch(0)[0], 1)


FAULT = pytest.mark.parametrize("fault", ["lost", pytest.param("hung", marks=pytest.mark.slow)])  # a hung one is waited for


def sampled(engine: PlacedEngine) -> list[Segment]:
    return asyncio.run(engine.sample(CROWD))


@FAULT
@pytest.mark.parametrize(("name", "after"), [("sample", 0), ("sample", 1), ("answer", 0), ("answer", 2)])
@KERNELS
def test_a_sampler_that_fails_is_replaced_and_nothing_changes(fault: str, name: str, after: int) -> None:
    whole = sampled(placed(scratch(0)[0])[0])
    engine, here = placed(scratch(0)[0], timeout=3.0 if fault == "hung" else 60.0)
    getattr(here, fault)[name] = after
    with pytest.warns(UserWarning, match="another is started in its place, and what it had not answered is asked again"):
        assert sampled(engine) == whole
    assert len(here.started) == 3
    assert engine.counters()["sampled"] == sum(len(segment.tokens) for segment in whole), "counted once"


@FAULT
@KERNELS
def test_a_sampler_that_fails_while_it_loads_has_the_weights_afterwards(fault: str) -> None:
    other = scratch(1)[0]
    whole = sampled(placed(other)[0])
    engine, here = placed(scratch(0)[0], timeout=3.0 if fault == "hung" else 60.0)
    getattr(here, fault)["load"] = 1

    async def story() -> list[Segment]:
        await engine.load(dict(other.state_dict()), 4)
        return await engine.sample(CROWD)

    with pytest.warns(UserWarning, match="another is started in its place"):
        segments = asyncio.run(story())
    assert [s.tokens for s in segments] == [s.tokens for s in whole]
    assert {s.version for s in segments} == {4}


@FAULT
@KERNELS
def test_a_sampler_that_fails_while_it_starts_gives_way_to_another(fault: str) -> None:
    whole = sampled(placed(scratch(0)[0])[0])
    with pytest.warns(UserWarning, match="another is started in its place"):
        engine, here = placed(scratch(0)[0], patience=3.0 if fault == "hung" else 60.0, faults={fault: {"begin": 1}})
    assert len(here.started) == 3
    assert sampled(engine) == whole


@KERNELS
def test_what_lost_samplers_have_counted_stays_counted() -> None:
    """Also where the first one in a lost one's place is lost while it starts."""
    engine, here = placed(scratch(0)[0], 1)

    async def story() -> tuple[dict[str, int], dict[str, int]]:
        await engine.sample(CROWD)
        before = engine.counters()
        here.lost |= {"sample": 0, "begin": 0}
        await engine.sample(CROWD)
        return before, engine.counters()

    with pytest.warns(UserWarning, match="another is started in its place"):
        before, after = asyncio.run(story())
    assert len(here.started) == 3
    assert not {name: (count, after[name]) for name, count in before.items() if after[name] < count}


@pytest.mark.parametrize("error", [MemoryError("none left"), FileNotFoundError("no file"), PermissionError("not yours"), KeyError("what")], ids=repr)
@KERNELS
def test_whatever_keeps_a_sampler_away_is_said_and_the_others_go_on(error: Exception) -> None:
    engine, here = placed(scratch(0)[0], 2)

    async def start(place: int) -> Any:
        raise error

    async def story() -> None:
        here.start = start  # type: ignore[method-assign]
        here.lost["sample"] = 0
        assert len(await engine.sample(CROWD)) == len(CROWD)
        while engine._here.tasks:
            await asyncio.sleep(0)
        assert len(await engine.sample(CROWD)) == len(CROWD)

    with pytest.warns(UserWarning, match=rf"sampler \d stays away \({type(error).__name__}: .*{error.args[0]}.*\); the run goes on with its others"):
        asyncio.run(story())
    assert sum(server.away for server in engine.servers) == 1


@KERNELS
def test_a_pool_whose_samplers_are_all_lost_goes_on() -> None:
    whole = sampled(placed(scratch(0)[0], 1)[0])
    engine, here = placed(scratch(0)[0], 1)
    here.lost["sample"] = 0
    with pytest.warns(UserWarning, match="another is started in its place"):
        assert sampled(engine) == whole


@KERNELS
def test_a_sampler_that_sees_other_folders_is_a_sentence(tmp_path: Path) -> None:
    """Weights go by a folder that is not shared: no other process would see them."""
    model = scratch(0)[0]
    engine, here = placed(model)
    engine.folder, call = tmp_path, here.call

    async def elsewhere(process: Any, name: str, *parts: Any) -> Any:
        if name == "load":
            parts = (str(tmp_path / "of another machine"), *parts[1:])
        return await call(process, name, *parts)

    here.call = elsewhere
    with pytest.raises(ConnectionError, match=r"sampler 0 .*does not find the weights in .*: set cluster.folder to one that all machines share"):
        asyncio.run(engine.load(dict(model.state_dict()), 1))


@pytest.mark.parametrize("slept", [False, True])
@pytest.mark.parametrize("how", ["refused", "broken off"])
@KERNELS
def test_a_load_that_fails_in_one_sampler_leaves_all_the_weights_that_were(how: str, slept: bool) -> None:
    model, other = scratch(0)[0], scratch(1)[0]
    engine, here = placed(model, rests=slept)
    whole, process = sampled(engine), here.started[1]
    real = process.engine.load

    async def load(weights: Any, version: int) -> None:
        if version == 4:
            while here.started[0].loaded != engine._pushed.name:  # type: ignore[union-attr]
                await asyncio.sleep(0)
            if how == "refused":
                raise ValueError("no such weights")
            loading[0].cancel()
            await asyncio.sleep(3600)
        await real(weights, version)

    async def story() -> None:
        loading.append(asyncio.ensure_future(engine.load(dict(other.state_dict()), 4)))
        with pytest.raises(ValueError if how == "refused" else asyncio.CancelledError):
            await loading[0]

    loading: list[asyncio.Future[None]] = []
    process.engine.load = load  # type: ignore[method-assign]
    if slept:
        asyncio.run(engine.sleep())
    asyncio.run(story())
    assert here.started[0].engine.version == 4  # type: ignore[attr-defined]
    assert sampled(engine) == whole
    for one in here.started:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.model.parameters(), model.parameters(), strict=True))


class OwnSender:
    """Sends weights as bytes, by the sampler."""

    def __init__(self, relay: Any, host: str, timeout: float) -> None:
        self.relay = relay

    def hold(self, weights: Any, version: int) -> Held:
        return Held(Path(), version, tensors=weights, now=lambda: version)

    async def send(self, new: Held, in_flight: bool) -> Any:
        return await self.relay(to_bytes(new.tensors), new.version)

    def close(self) -> None: ...


class SentLocal(AroundEngine):
    """The local engine, into which somebody sends weights."""

    async def relay(self, *question: Any) -> Any:
        body, version = question
        await self.engine.load(state_of_bytes(body), version)
        return f"has {version}"

    def took(self, word: Any, name: str, version: int) -> None:
        assert word == f"has {version}"

    async def sample(self, requests: Any) -> list[Segment]:
        return await self.engine.sample(requests)


@dataclass(frozen=True)
class OwnEngine:
    """A factory of somebody's own, of which a run knows nothing but its traits."""

    traits: ClassVar[EngineTraits] = EngineTraits(sender=OwnSender)

    def __call__(self, model: Any, decode: Any) -> SentLocal:
        return SentLocal(Local(slots=8, threads=1)(model, decode))


@KERNELS
def test_weights_go_straight_into_whatever_engine_has_a_sender() -> None:
    model, other = scratch(0)[0], scratch(1)[0]
    whole = sampled(placed(other)[0])
    engine, here = placed(model, factory=OwnEngine(), sender=OwnSender)
    assert "live" in engine.features

    async def story() -> list[Segment]:
        await engine.load(dict(other.state_dict()), 4)
        here.lost["sample"] = 0
        return await engine.sample(CROWD)

    with pytest.warns(UserWarning, match="another is started in its place"):
        segments = asyncio.run(story())
    assert [s.tokens for s in segments] == [s.tokens for s in whole]
    assert {s.version for s in segments} == {4}


def test_a_rank_that_does_not_reach_the_first_says_so_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"does not reach rank 0 at 127.0.0.1:{port} \(Connection refused\): open the ports"):
        serve_at(1, "127.0.0.1", port, 2, 2, 1800.0)


@KERNELS
def test_samplers_that_slept_are_given_their_weights_when_somebody_asks() -> None:
    model = scratch(0)[0]
    whole = sampled(placed(model)[0])
    engine, here = placed(model, rests=True)
    asyncio.run(engine.sleep())
    assert all(p.untyped_storage().nbytes() == 0 for process in here.started for p in process.model.parameters()), "its weights take no memory"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampled(engine) == whole
    assert torch.equal(next(here.started[0].model.parameters()), next(model.parameters()))
