"""What goes wrong between a run and its vLLM servers: seen, said in a sentence, mended, and nothing sampled is lost or another text for it."""

from __future__ import annotations

import asyncio
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from misbehaving import FAULTS, Misbehaving, half, misbehaving, started, stopped
from ramulus.engine.engine import Request, Sampling, Segment, StopRule, known_rules
from ramulus.engine.vllm.factory import Vllm
from ramulus.engine.vllm.server import Server
from ramulus.engine.vllm.vllm_engine import VllmEngine
from ramulus.engine.vllm.wire import KNOWN_RULES
from ramulus.run.stage import check_engine
from run_recipe import rl

CROWD = [Request((1, 2, 3 + i % 5), Sampling(4 + i), StopRule(frozenset({1})), seed=i) for i in range(9)]
WEIGHTS = {"a": torch.ones(2)}


@dataclass(frozen=True)
class Halved:
    """A temperature rule that no server knows."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.full(logits.shape[:1], 0.5)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramulus.engine.pool.BETWEEN", 0.01)


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    with misbehaving() as [one]:
        yield one


def engine(*servers: Misbehaving, timeout: float = 20.0, reconnect: float = 5.0, in_flight: bool = False) -> VllmEngine:
    met = [Server(server.url, "", timeout) for server in servers]
    for one in met:
        one.meet(False, 1.0)
    return VllmEngine(met, Path(tempfile.mkdtemp()), reconnect, in_flight)


def test_the_rules_that_a_server_knows_are_said_before_work_begins(server: Misbehaving) -> None:
    one = engine(server)
    assert known_rules(one.features) == list(KNOWN_RULES)
    with pytest.raises(ValueError, match=r"Halved\(\) is a temperature rule that Vllm\(.*\) does not know \(it knows ByEntropy\): take one of these"):
        check_engine(replace(rl(), engine=Vllm(), temperature=Halved()), one)
    check_engine(replace(rl(), engine=Vllm()), one)


async def loaded(one: VllmEngine, version: int = 3) -> VllmEngine:
    await one.load(WEIGHTS, version)
    return one


def whole(server: Misbehaving) -> list[Segment]:
    """What an undisturbed server answers."""

    async def story() -> list[Segment]:
        return await (await loaded(engine(server))).sample(CROWD)

    return asyncio.run(story())


def said(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_said_in_a_sentence_and_what_is_asked_again_is_the_same(name: str, server: Misbehaving) -> None:
    fault, words = FAULTS[name]
    undisturbed = whole(server)
    server.faults = [fault]

    async def story() -> list[Segment]:
        one = await loaded(engine(server, timeout=0.5 if name == "hung" else 20.0))
        before = one.counters()["sampled"]
        answers = await one.sample(CROWD)
        assert one.counters()["sampled"] - before == sum(len(s.tokens) for s in answers), "counted once"
        return answers

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert asyncio.run(story()) == undisturbed
    [text] = said(caught)
    assert words in text
    assert "asked again" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ("hung", "twice")])
def test_a_fault_that_stays_ends_in_a_sentence(name: str, server: Misbehaving) -> None:
    server.faults, server.always = [FAULTS[name][0]], True

    async def story() -> None:
        one = await loaded(engine(server))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match=r"times in a row: look at the server") as caught:
                await one.sample(CROWD[:3])
        assert FAULTS[name][1] in str(caught.value)
        server.faults = []
        assert len(await one.sample(CROWD)) == 9, "it goes on"

    asyncio.run(story())


def test_a_server_that_comes_back_is_given_its_weights(server: Misbehaving) -> None:
    undisturbed = whole(server)

    async def story() -> list[Segment]:
        one = await loaded(engine(server))
        await one.load(WEIGHTS, 3)
        port = server.server_port
        await asyncio.to_thread(stopped, server)
        asking = asyncio.ensure_future(one.sample(CROWD))
        await asyncio.sleep(0.5)
        back = started(Misbehaving(port))
        try:
            answers = await asking
            assert back.loads == 1
            assert back.version == 3
        finally:
            await asyncio.to_thread(stopped, back)
        return answers

    with pytest.warns(UserWarning, match="it is looked for for 5 s, and what it had not answered is asked again"):
        assert asyncio.run(story()) == undisturbed


def test_a_server_that_stays_away_ends_in_a_sentence(server: Misbehaving) -> None:
    async def story() -> None:
        one = await loaded(engine(server, reconnect=0.3))
        await asyncio.to_thread(stopped, server)
        with pytest.raises(ConnectionError, match=r"has not come back within 0.3 s: start it again, and go on with --resume"):
            await one.sample(CROWD)

    with pytest.warns(UserWarning, match="is lost"):
        asyncio.run(story())


@pytest.mark.parametrize(
    ("greeting", "words"), [({"vocabulary": 20}, "its vocabulary is 20 and was 18"), ({"vllm": "0.33.1"}, "its vllm is '0.33.1'")]
)
def test_another_server_in_its_place_is_no_substitute(greeting: dict[str, Any], words: str, server: Misbehaving) -> None:
    async def story() -> None:
        one = await loaded(engine(server))
        server.instance, server.loaded, server.greeting = "new", "", greeting
        with pytest.raises(ConnectionError, match="is not the one it was: " + words):
            await one.sample(CROWD)

    asyncio.run(story())


def test_two_runs_do_not_share_a_server(server: Misbehaving) -> None:
    async def story() -> None:
        one, other = await loaded(engine(server)), engine(server)
        await loaded(other)
        with pytest.raises(ConnectionError, match="another run has loaded its weights"):
            await one.sample(CROWD)
        assert len(await other.sample(CROWD)) == 9

    asyncio.run(story())


def test_of_two_servers_the_other_takes_over_and_the_lost_one_comes_back() -> None:
    with misbehaving(2) as [first, second]:
        undisturbed = whole(first)

        async def story() -> None:
            one = await loaded(engine(first, second))
            assert await one.sample(CROWD) == undisturbed
            assert first.calls * second.calls, "both are asked"
            second.faults = [half]
            before = first.calls
            assert await one.sample(CROWD) == undisturbed
            assert first.calls > before
            while one.servers[1].away:
                await asyncio.sleep(0.02)
            await one.load(WEIGHTS, 3)
            calls = second.calls
            assert await one.sample(CROWD) == undisturbed
            assert second.calls > calls, "it is asked again"

        with pytest.warns(UserWarning, match="is lost"):
            asyncio.run(story())


def test_a_server_lost_for_good_leaves_the_run_its_others() -> None:
    with misbehaving(1) as [first]:
        undisturbed = whole(first)

        async def story() -> None:
            second = started(Misbehaving())
            one = await loaded(engine(first, second, reconnect=0.3))
            await asyncio.to_thread(stopped, second)
            for version in (3, 3):
                assert await one.sample(CROWD) == undisturbed
                await asyncio.sleep(0.6)
                await one.load(WEIGHTS, version)
            assert one.servers[1].away

        with pytest.warns(UserWarning, match="the run goes on with its others"):
            asyncio.run(story())


def test_servers_that_differ_are_refused() -> None:
    with misbehaving(2) as [first, second]:
        second.greeting = {"limit": 128}
        with pytest.raises(ConnectionError, match="its limit is 128 and was 256; serve one model alike"):
            engine(first, second)


def test_swaps_in_flight_need_versions(server: Misbehaving) -> None:
    server.greeting = {"vllm": "0.31.0"}
    [one] = engine(server).servers
    with pytest.raises(ValueError, match=r"vLLM 0.31.0 does not say which weights sampled a token: take 0.32"):
        VllmEngine([one], Path(tempfile.mkdtemp()), in_flight=True)


def test_a_refusal_and_a_stop_reach_who_asked(server: Misbehaving) -> None:
    def refused(handler: Any, lines: list[Any]) -> bool:
        lines[1] = {"index": 1, "status": 400, "answer": {"error": {"message": "no such thing"}}}
        return False

    async def story() -> None:
        one = await loaded(engine(server))
        server.faults = [refused]
        with pytest.raises(ValueError, match="refuses a request: no such thing"):
            await one.sample(CROWD)
        task = asyncio.ensure_future(one.sample(CROWD))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(await one.sample(CROWD)) == 9

    asyncio.run(story())


def test_a_load_that_fails_leaves_the_weights_that_were(server: Misbehaving) -> None:
    undisturbed = whole(server)
    real = server.hello

    async def story() -> None:
        one = await loaded(engine(server))
        former = one._pushed
        server.hello = lambda: {"protocol": 1}  # type: ignore[method-assign]
        with pytest.raises(ConnectionError, match="no vLLM server with ramulus's plug-in"):
            await one.load(WEIGHTS, 4)
        server.hello = real  # type: ignore[method-assign]
        assert one._pushed is former
        assert await one.sample(CROWD) == undisturbed, "the old ones are loaded again"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.run(story())


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("refusing", [0, 1])
def test_a_load_that_one_server_refuses_leaves_all_the_weights_that_were(refusing: int, in_flight: bool) -> None:
    with misbehaving(2) as servers:
        undisturbed = whole(servers[0])
        servers[refusing].loading = lambda version: "no such weights" if version == 4 else None

        async def story() -> None:
            one = await loaded(engine(*servers, in_flight=in_flight))
            for _ in range(2):
                with pytest.raises(ValueError, match="no such weights"):
                    await one.load(WEIGHTS, 4)
                calls = [server.calls for server in servers]
                assert await one.sample(CROWD) == undisturbed, "by the ones before"
                assert all(server.calls > before for server, before in zip(servers, calls, strict=True)), "all are asked"
                assert {server.version for server in servers} == {3}
            await one.load(WEIGHTS, 5)
            assert {segment.version for segment in await one.sample(CROWD)} == {5}

        asyncio.run(story())


def test_a_load_that_is_broken_off_leaves_all_the_weights_that_were() -> None:
    """One server has taken the new ones, the other one takes them when nobody listens any more."""
    with misbehaving(2) as [first, second]:
        undisturbed = whole(first)
        there, go = Event(), Event()

        def slow(version: int) -> None:
            if version == 4:
                there.set()
                go.wait(20)

        second.loading = slow

        async def story() -> None:
            one = await loaded(engine(first, second))
            task = asyncio.ensure_future(one.load(WEIGHTS, 4))
            await asyncio.to_thread(there.wait, 20)
            while one.servers[0].loaded != one._pushed.name:  # type: ignore[union-attr]
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert first.version == 4
            assert await one.sample(CROWD) == undisturbed
            go.set()
            while second.version != 4:
                await asyncio.sleep(0.001)
            assert await one.sample(CROWD) == undisturbed, "a late one is seen"
            assert (first.version, second.version) == (3, 3)

        asyncio.run(story())


def test_a_server_that_dies_in_a_load_that_fails_comes_back_with_the_weights_that_were() -> None:
    with misbehaving(2) as [first, second]:
        undisturbed = whole(first)
        gone = Event()

        def refusing(version: int) -> str | None:
            return "no such weights" if version == 4 and gone.wait(20) else None

        def dying(version: int) -> str:
            Thread(target=lambda: (stopped(second), gone.set()), daemon=True).start()
            gone.wait(20)
            return "it is gone"

        first.loading = refusing

        async def story() -> None:
            one = await loaded(engine(first, second))
            second.loading = dying
            with pytest.raises(ValueError, match="no such weights"):
                await one.load(WEIGHTS, 4)
            assert await one.sample(CROWD) == undisturbed
            back = started(Misbehaving(second.server_port))
            try:
                while one.servers[1].away:
                    await asyncio.sleep(0.01)
                assert await one.sample(CROWD) == undisturbed
                assert (back.version, back.loads, back.calls > 0) == (3, 1, True)
            finally:
                await asyncio.to_thread(stopped, back)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asyncio.run(story())


def test_weights_that_cannot_be_given_again_are_a_sentence() -> None:
    with misbehaving(2) as [first, second]:
        full: list[bool] = []
        first.loading = lambda version: "no room" if version == 3 and full else None
        second.loading = lambda version: "no such weights" if version == 4 else None

        async def story() -> None:
            one = engine(first, second)
            with pytest.raises(ValueError, match="no such weights"):
                await one.load(WEIGHTS, 4)
            with pytest.raises(ValueError, match="no weights before the first load"):
                await one.sample(CROWD)
            await loaded(one)
            with pytest.raises(ValueError, match="no such weights"):
                await one.load(WEIGHTS, 4)
            full.append(True)
            with pytest.raises(ValueError, match="refuses: no room"):
                await one.sample(CROWD)
            await one.load(WEIGHTS, 5)
            assert {segment.version for segment in await one.sample(CROWD)} == {5}

        asyncio.run(story())


def test_a_server_elsewhere_that_ignores_its_key_is_refused(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramulus.engine.vllm.server.is_loopback", lambda host: False)
    elsewhere = Server(server.url, "a key", 5.0)
    with pytest.raises(PermissionError, match=r"answers without a key, so that whoever reaches it can change its weights: .*expose=True"):
        elsewhere.meet(False, 1.0)
    elsewhere.meet(True, 1.0)


