"""The engine of another process: the same tokens and errors as here, and what happens when the server is wrong, slow, lost or another one."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import signal
import socket
import socketserver
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any, ClassVar

import httpx2
import pytest
import torch
from safetensors.torch import save_file

import run_recipe
from engines import small
from ramulus.engine.engine import Request, Sampling, Segment, StopRule, known_rules, named_rules
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.remote.client import RemoteEngine
from ramulus.engine.remote.factory import Remote
from ramulus.engine.remote.listen import bind, listener
from ramulus.engine.remote.server import Served
from ramulus.engine.remote.wire import (
    HEADER,
    of_column,
    requests_of_json,
    requests_to_json,
    rule_of_json,
    segment_of_json,
    segment_to_json,
    to_column,
)
from ramulus.engine.toy import ToyEngine
from ramulus.engine.vllm.factory import Vllm
from ramulus.engine.weight_bytes import state_of_bytes, table_of_bytes, to_bytes
from ramulus.grow.temperature import ByEntropy
from ramulus.run.config.describe import recipe_text, to_json
from ramulus.run.config.override import override
from ramulus.run.serve import Address
from ramulus.run.stage import check_engine
from served import ENVIRONMENT, TOKEN, Server, served

RULE = ByEntropy(stats={"pivot": 0.1, "rms": 0.5, "above": 1.0, "below": 1.0})
RULES = {"ByEntropy": ByEntropy}
TABLE = {(): [0.3, 0.1, 0.2, 0.0, 0.5, 0.7, 0.1, 0.2], (1,): [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served("toy") as one:
        yield one


def crowd() -> list[Request]:
    """Requests of every kind that a server takes."""
    kinds = [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 4, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": RULE}, {}]
    stop = StopRule(frozenset({3}))
    return [Request((i % 8, 2), Sampling(3 + i, **kinds[i % 5]), stop, seed=i * 10**17) for i in range(20)]  # type: ignore[arg-type]


def toy() -> ToyEngine:
    return ToyEngine(as_array=torch.tensor)


def ask(engine: Any, requests: list[Request]) -> list[Segment]:
    return asyncio.run(engine.sample(requests))


def test_requests_and_segments_come_back_as_they_were() -> None:
    requests = crowd()
    content = json.loads(json.dumps(requests_to_json(requests)))
    assert requests_of_json(content, RULES) == requests
    assert len(content["prefixes"]) == 8, "what is shared is said once"
    segments = ask(toy(), requests)
    assert [segment_of_json(json.loads(json.dumps(segment_to_json(segment)))) for segment in segments] == segments
    values = array("d", [0.1, float("inf"), -0.0])
    assert of_column(to_column(values)) == values


@pytest.mark.parametrize("text", ["", "i", "q:AAAA", "i:AAA", "i:AAAA", "f:=!"])
def test_what_is_no_column_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"column|base64|padding"):
        of_column(text)


def test_a_pickle_and_an_unknown_class_are_never_built() -> None:
    with pytest.raises(ValueError, match="does not know the temperature rule 'Popen': it knows ByEntropy"):
        rule_of_json({"rule": "Popen", "fields": {"args": "true"}}, RULES)
    with pytest.raises(ValueError, match="has no field 'taus'"):
        rule_of_json({"rule": "ByEntropy", "fields": {"taus": 1}}, RULES)
    with pytest.raises(ValueError, match="no weights"):
        state_of_bytes(pickle.dumps({"a": 1}))


def test_tied_tensors_travel_once_and_arrive_tied() -> None:
    state = small("llama").state_dict()
    state["view"] = torch.arange(12.0).view(3, 4)[:, 1:3]
    body = to_bytes(state)
    back = state_of_bytes(body)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert back["lm_head.weight"].data_ptr() == back["model.embed_tokens.weight"].data_ptr()
    once = sum(tensor.nbytes for name, tensor in state.items() if name != "lm_head.weight")
    assert once < len(body) < once + 10_000


def test_a_served_engine_answers_as_it_would_here(server: Server) -> None:
    engine, here = server.engine(), toy()
    assert ask(engine, crowd()) == ask(here, crowd())
    assert engine.features == here.features - {"until", "in_place"} | {"rules/ByEntropy"}
    assert engine.limit == here.limit
    assert engine.counters()["sampled"] == here.counters()["sampled"] > 0
    assert ask(engine, []) == []
    assert ask(engine, crowd()) == ask(here, crowd()), "a second event loop"


def test_weights_are_pushed_and_named_by_their_version(server: Server) -> None:
    engine, here = server.engine(), toy()

    async def steps() -> None:
        for version, table in ((4, TABLE), (5, {})):
            for one in (engine, here):
                await one.load(table, version)
            segments = await engine.sample(crowd())
            assert segments == await here.sample(crowd())
            assert {segment.version for segment in segments} == {segment.newest for segment in segments} == {version}
        await engine.reset()
        assert await engine.sample(crowd()) == await here.sample(crowd())
        with pytest.raises(ValueError, match="in place"):
            await engine.load(None, 6)

    asyncio.run(steps())


def test_errors_are_those_of_the_engine(server: Server) -> None:
    engine = server.engine()
    for prefix in ((), (99,)):
        said = []
        for one in (engine, toy()):
            with pytest.raises(ValueError, match="prefix") as caught:
                ask(one, [Request(prefix, Sampling(3))])
            said.append(str(caught.value))
        assert said[0] == said[1]
    with pytest.raises(ValueError, match="has 1 logits"):
        asyncio.run(engine.load({(): [1.0]}, 1))
    with pytest.raises(ValueError, match="until is a function"):
        ask(engine, [Request((1,), Sampling(3), until=lambda tokens: None)])
    assert len(ask(engine, crowd())) == 20, "it lives"


@dataclass(frozen=True)
class Mine:
    """A rule that no server knows."""

    heat: float = 1.0

    def __call__(self, logits: Any) -> Any:
        return logits[:, 0] * 0 + self.heat


def test_an_unknown_rule_is_refused_in_a_sentence(server: Server) -> None:
    with pytest.raises(ValueError, match=r"does not know the temperature rule 'Mine': it knows ByEntropy; .*engine=Local"):
        ask(server.engine(), [Request((1,), Sampling(3, Mine()))])
    with pytest.raises(ValueError, match="make it a frozen dataclass"):
        ask(server.engine(), [Request((1,), Sampling(3, lambda logits: logits[:, 0]))])


def test_an_unknown_rule_is_refused_before_work_begins(server: Server) -> None:
    run = replace(run_recipe.rl(), engine=Remote(server.url), temperature=Mine())
    with pytest.raises(ValueError, match=r"Mine\(heat=1.0\) is a temperature rule that Remote\(.*\) does not know \(it knows ByEntropy\)"):
        check_engine(run, server.engine())
    with pytest.raises(ValueError, match=r"<function .*<lambda> at .*> is a temperature rule that Remote\("):
        check_engine(replace(run, temperature=lambda logits: logits[:, 0]), server.engine())
    assert known_rules(server.engine().features) == ["ByEntropy"]
    check_engine(replace(run, temperature=ByEntropy()), server.engine())
    check_engine(run, toy())


def test_the_token_is_asked_for_at_every_address(server: Server) -> None:
    with pytest.raises(PermissionError, match="refuses the token: set RAMULUS_TOKEN"):
        server.engine("another")
    calls = [("GET", "hello"), ("POST", "sample"), ("POST", "load?name=x&version=1"), ("POST", "reset"), ("GET", "nothing")]
    for given in ({}, {"authorization": "Bearer"}, {"authorization": f"Basic {TOKEN}"}, {"authorization": f"Bearer {TOKEN} "[:-2]}):
        for method, path in calls:
            answer = httpx2.request(method, f"{server.url}v1/{path}", headers=given | {HEADER: "1"})
            assert answer.status_code == 401
            assert answer.json() == {"kind": "PermissionError", "error": "wrong token"}


def test_another_protocol_and_nonsense_are_answered_in_a_sentence(server: Server) -> None:
    known = {"authorization": f"Bearer {TOKEN}"}
    answer = httpx2.get(f"{server.url}v1/hello", headers=known | {HEADER: "7"})
    assert answer.status_code == 426
    assert "speaks protocol 1, the client 7: install the same ramulus" in answer.json()["error"]
    hello = httpx2.get(f"{server.url}v1/hello", headers=known | {HEADER: "1"}).json()
    stamp = {"instance": hello["instance"], "loaded": hello["loaded"]}
    lost = stamp | {"prefixes": [], "kinds": [], "requests": [[5, 0, 0]]}
    for content in (b"\x80\x04N.", b"[]", json.dumps(stamp).encode(), json.dumps(lost).encode()):
        answer = httpx2.post(f"{server.url}v1/sample", content=content, headers=known | {HEADER: "1"})
        assert answer.status_code == 400
        assert answer.json()["kind"] == "ValueError"
    assert httpx2.get(f"{server.url}v1/other", headers=known | {HEADER: "1"}).status_code == 404


WRONG: list[tuple[dict[str, object], str]] = [
    ({"max_tokens": 8.5}, "max_tokens must be a whole number, got 8.5"),
    ({"max_tokens": "8"}, "max_tokens must be a whole number, got '8'"),
    ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
    ({"temperature": math.inf}, "temperature must be a number from 0"),
    ({"temperature": {"rule": "ByEntropy", "fields": {"stats": {"median": 0.5}}}}, "stats are numbers named pivot"),
    ({"temperature": {"rule": "ByEntropy", "fields": {"stats": {"pivot": math.nan, "rms": 1.0}}}}, "got pivot=nan"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG)
def test_settings_that_no_token_can_be_drawn_by_are_refused_before_any_is(server: Server, wrong: dict[str, object], text: str) -> None:
    known = {"authorization": f"Bearer {TOKEN}", HEADER: "1"}
    hello = httpx2.get(f"{server.url}v1/hello", headers=known).json()
    content = requests_to_json([Request((1, 2), Sampling(4), StopRule())])
    content["kinds"][0]["sampling"] |= wrong
    body = json.dumps(content | {"instance": hello["instance"], "loaded": hello["loaded"]})
    answer = httpx2.post(f"{server.url}v1/sample", content=body, headers=known)
    assert answer.status_code == 400
    assert answer.json()["kind"] == "ValueError"
    assert text in answer.json()["error"]
    assert answer.json()["counters"]["sampled"] == hello["counters"]["sampled"]


def test_nobody_there_and_somebody_else_there() -> None:
    with pytest.raises(ConnectionError, match=r"no engine server answers at http://127.0.0.1:9 .*ramulus serve"):
        RemoteEngine("http://127.0.0.1:9/", TOKEN, reconnect=0.2)
    with pytest.raises(ValueError, match="write http://"):
        RemoteEngine("127.0.0.1:9", TOKEN)
    with pytest.raises(ValueError, match="set RAMULUS_TOKEN"):
        RemoteEngine("http://127.0.0.1:9/", "")

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        Thread(target=page.serve_forever, daemon=True).start()
        with pytest.raises(ConnectionError, match="is no engine server: check url"):
            RemoteEngine(f"http://127.0.0.1:{page.server_port}/", TOKEN)
        page.shutdown()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["toy", "--host", "0.0.0.0"], "can be reached from other machines: add --expose"),
        (["toy", "--host", "0.0.0.0", "--expose"], "needs a token that you choose: set RAMULUS_TOKEN"),
        (["toy:many"], "write toy, or toy:64"),
        (["./nothing"], "there is no model folder nothing"),
    ],
)
def test_what_cannot_be_served_is_said(words: list[str], said: str) -> None:
    environment = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name != "RAMULUS_TOKEN"}
    command = [sys.executable, "-c", "from ramulus.cli import main; main()", "serve", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hung_server_ends_at_the_deadline() -> None:
    with served("toy") as server:
        engine = server.engine(timeout=1.0)
        server.signal(signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError, match="has not answered within 1 s"):
                ask(engine, crowd())
            with pytest.raises(TimeoutError, match="is there and does not answer"):
                server.engine(timeout=1.0)
        finally:
            server.signal(signal.SIGCONT)
        assert ask(engine, crowd()) == ask(toy(), crowd())


@pytest.mark.slow
def test_a_server_that_was_started_again_gets_its_weights_and_gives_the_same_tokens() -> None:
    with served("toy") as server:
        engine, here = server.engine(), toy()

        async def through() -> None:
            for one in (engine, here):
                await one.load(TABLE, 7)
            first = await engine.sample(crowd())
            sampled = engine.counters()["sampled"]
            server.signal(signal.SIGKILL)
            waiting = [asyncio.ensure_future(engine.sample(crowd())) for _ in range(3)]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(server.start)
            assert await asyncio.gather(*waiting) == [first] * 3
            assert first == await here.sample(crowd())
            assert engine.counters()["sampled"] == 4 * sampled, "what the lost server counted is not forgotten"

        asyncio.run(through())
        server.signal(signal.SIGKILL)
        server.model = "toy:9"
        server.start()
        with pytest.raises(ConnectionError, match="is not the one it was: its vocabulary is 9 and was 8"):
            ask(engine, crowd())
        server.signal(signal.SIGKILL)
        impatient = Server("toy", port=server.port)
        engine.reconnect = 0.2
        with pytest.raises(ConnectionError, match="no engine server answers"):
            ask(engine, crowd())
        impatient.start()
        server.process = impatient.process


def test_two_runs_do_not_share_a_server(server: Server) -> None:
    one, other = server.engine(), server.engine()

    async def both() -> None:
        await one.load(TABLE, 1)
        await other.load({}, 1)
        with pytest.raises(ConnectionError, match="another client has loaded its weights"):
            await one.sample(crowd())
        assert len(await other.sample(crowd())) == 20

    asyncio.run(both())


class Slow(ToyEngine):
    """Takes weights when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.features |= {"sleep", "live", "in_place"}
        self.began, self.go = Event(), Event()

    async def load(self, weights: Any, version: int) -> None:
        self.began.set()
        await asyncio.to_thread(self.go.wait, 20)
        await super().load(weights, version)


@contextmanager
def slow() -> Iterator[tuple[Slow, Served, str]]:
    """It, what serves it in this process, and where."""
    engine, urls = Slow(), Queue[str]()
    web = Served(engine, TOKEN, "toy", 8, {}, table_of_bytes)
    bound = bind("127.0.0.1", 0)
    running = listener(lambda: web, "127.0.0.1", bound, urls.put, "remote")
    thread = Thread(target=lambda: asyncio.run(running.serve([bound])), daemon=True)
    thread.start()
    yield engine, web, urls.get(timeout=20)
    engine.go.set()
    running.should_exit = True
    thread.join(20)


@pytest.mark.parametrize("how", ["too slow", "cancelled"])
def test_a_load_that_is_not_waited_for_leaves_the_weights_that_were(how: str) -> None:
    """The server takes them all the same, before something is sampled or after."""
    asked = [Request((i, 2), Sampling(5), seed=i) for i in range(6)]
    with slow() as (there, web, url):

        async def given_up(engine: RemoteEngine, version: int) -> None:
            there.began.clear()
            there.go.clear()
            engine.timeout = 0.1 if how == "too slow" else 60.0
            while not there.began.is_set():  # a busy machine may not have brought it there
                loading = asyncio.ensure_future(engine.load({(): [0.0] * 8}, version))
                if how == "cancelled":
                    await asyncio.to_thread(there.began.wait, 20)
                    loading.cancel()
                with pytest.raises(TimeoutError if how == "too slow" else asyncio.CancelledError):
                    await loading
            engine.timeout = 60.0

        async def story() -> None:
            engine, here = RemoteEngine(url, TOKEN), ToyEngine()
            await given_up(engine, 1)
            there.go.set()
            with pytest.raises(ConnectionError, match="has taken the weights of a load that failed here, without those it had before: load weights"):
                await engine.sample(asked)
            for one in (engine, here):
                await one.load(TABLE, 2)
            undisturbed = await here.sample(asked)
            assert await engine.sample(asked) == undisturbed
            for taken_before in (True, False):
                await given_up(engine, 3)
                sampling = None if taken_before else asyncio.ensure_future(engine.sample(asked))
                await asyncio.sleep(0)
                there.go.set()
                assert await (sampling or engine.sample(asked)) == undisturbed, "by those that were pushed before"
            await given_up(engine, 4)
            there.go.set()
            await engine.load({}, 5)
            assert {segment.version for segment in await engine.sample(asked)} == {5}
            other = RemoteEngine(url, TOKEN)
            await given_up(engine, 6)
            there.go.set()
            await other.load(TABLE, 7)
            for instance in (web.instance, "started again"):
                web.instance = instance
                with pytest.raises(ConnectionError, match="another client has loaded its weights"):
                    await engine.sample(asked)
            assert {segment.version for segment in await other.sample(asked)} == {7}

        asyncio.run(story())


def test_features_that_need_its_process_are_not_listed() -> None:
    with slow() as (there, _, url):
        features = RemoteEngine(url, TOKEN).features
        assert features - named_rules(RULES) == there.features - {"sleep", "live", "in_place", "until", "rules"} == {"entropy", "kept"}
        assert known_rules(there.features) is None
        assert known_rules(features) == [], "that server builds none"


def test_a_client_that_leaves_takes_its_requests_along(server: Server) -> None:
    engine = server.engine()

    async def leave() -> None:
        long = [Request((1,), Sampling(2), seed=i) for i in range(50)]
        tasks = [asyncio.ensure_future(engine.sample(long)) for _ in range(20)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        assert all(isinstance(answer, asyncio.CancelledError) for answer in await asyncio.gather(*tasks, return_exceptions=True))
        assert len(await engine.sample(crowd())) == 20

    asyncio.run(leave())


def test_the_token_is_in_no_repr_and_no_saved_recipe(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    remote = Remote("http://127.0.0.1:1/", token="a secret")
    for text in (repr(remote), json.dumps(to_json(remote)), recipe_text(remote)):
        assert "a secret" not in text
        assert "127.0.0.1:1" in text

    @dataclass(frozen=True)
    class Run:
        name: str
        engine: Remote

    with pytest.raises(ValueError, match=r"engine\.token is a secret") as caught:
        override((Run("one", remote),), ["engine.token=hush"])
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("RAMULUS_TOKEN", TOKEN)
    assert Remote(server.url)().vocabulary == 8
    with pytest.raises(ValueError, match="has 8 tokens and the model that is trained 48"):
        Remote(server.url)(small())
    with pytest.raises(ValueError, match=r"engine.timeout must be above 0"):
        Remote(server.url, timeout=0)


def test_a_token_is_in_no_repr_of_a_server() -> None:
    assert "a secret" not in repr(Served(ToyEngine(8), "a secret", "toy", 8, {}, table_of_bytes))
    assert "a secret" not in repr(Address("127.0.0.1", 0, "a secret", False))


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:80", "ftp://host/", "http://", "http:///", "http://host:abc/", "http://host:99999/", "http://host:0/", "http://[::1/", "http://a b/"],
)
def test_an_address_that_is_none_is_refused_in_a_sentence(url: str) -> None:
    for build in (lambda: Remote(url), lambda: RemoteEngine(url, TOKEN), lambda: Vllm(urls=(url,))):
        with pytest.raises(ValueError, match=r"is no address|is a tuple of addresses"):
            build()


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["timeout", "reconnect"])
def test_seconds_that_cannot_be_are_refused(name: str, seconds: float) -> None:
    for kind in (Remote, lambda url, **more: Vllm(urls=(url,), **more)):
        with pytest.raises(ValueError, match=r"engine\.reconnect at least 0 seconds"):
            kind("http://127.0.0.1:1/", **{name: seconds})


class Flaky(socketserver.BaseRequestHandler):
    """Stands before a server; each connection is first cut after as many seconds as are planned for it."""

    plan: ClassVar[list[float]] = []
    port: ClassVar[int] = 0

    def handle(self) -> None:
        if self.plan:
            self.request.recv(1)
            time.sleep(self.plan.pop(0))
            return
        with socket.create_connection(("127.0.0.1", self.port)) as there:
            back = Thread(target=self.pump, args=(there, self.request), daemon=True)
            back.start()
            self.pump(self.request, there)
            back.join(5)

    @staticmethod
    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while body := source.recv(65536):
                sink.sendall(body)
            sink.shutdown(socket.SHUT_WR)


def test_a_server_that_was_there_for_a_while_is_looked_for_anew(server: Server) -> None:
    """The window of `reconnect` is of one loss, however many a long call sees."""
    Flaky.port = int(server.url.rstrip("/").rpartition(":")[2])
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Flaky) as front:
        front.daemon_threads = True
        Thread(target=front.serve_forever, daemon=True).start()
        engine = RemoteEngine(f"http://127.0.0.1:{front.server_address[1]}/", TOKEN, reconnect=1.2)
        Flaky.plan[:] = [0.0, 1.3]
        assert len(asyncio.run(engine.sample([Request((1, 2), Sampling(max_tokens=3), StopRule())]))) == 1
        Flaky.plan[:] = [0.0] * 50
        with pytest.raises(ConnectionError, match="no engine server answers"):
            asyncio.run(engine.sample([Request((1, 2), Sampling(max_tokens=3), StopRule())]))
        Flaky.plan[:] = []
        front.shutdown()


def test_a_folder_of_weights_is_read_where_it_is(server: Server, tmp_path: Any) -> None:
    engine = server.engine()
    with pytest.raises(ValueError, match="sees no folder of safetensors"):
        asyncio.run(engine.load(tmp_path / "nothing", 1))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises((ValueError, TypeError)):  # the toy engine has no tensors
        asyncio.run(engine.load(tmp_path, 1))


@pytest.mark.slow
def test_the_local_engine_behind_a_server(tmp_path: Path) -> None:
    model, tokenizer = run_recipe.MODEL()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "first")
    other = {name: tensor + 0.5 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": RULE}, {}]
    requests = [Request((3, 4 + i % 5), Sampling(4 + i, **kinds[i % 4]), StopRule(frozenset({1})), seed=i) for i in range(16)]
    with served(str(tmp_path / "first")) as server:
        engine, here = server.engine(), LocalEngine(model)

        async def through() -> None:
            first = await engine.sample(requests)
            close(first, await here.sample(requests))
            for version, weights in ((1, other), (2, tmp_path / "second")):
                if version == 2:
                    (tmp_path / "second").mkdir()
                    save_file({name: tensor * 0.5 for name, tensor in other.items()}, tmp_path / "second" / "model.safetensors")
                await engine.load(weights, version)
                await here.load({name: tensor * 0.5 ** (version - 1) for name, tensor in other.items()}, version)
                segments = await engine.sample(requests)
                close(segments, await here.sample(requests))
                assert [segment.tokens for segment in segments] != [segment.tokens for segment in first]
            with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
                await engine.load({"lm_head.weight": torch.zeros(2, 2)}, 3)
            close(await engine.sample(requests), segments)
            server.signal(signal.SIGKILL)
            waiting = asyncio.ensure_future(engine.sample(requests))
            await asyncio.to_thread(server.start)
            close(await waiting, segments)

        asyncio.run(through())


def close(some: list[Segment], others: list[Segment]) -> None:
    """Equal but for the last bits of what was computed in a batch of another shape."""
    for one, other in zip(some, others, strict=True):
        assert (one.tokens, one.finish, one.version, one.newest) == (other.tokens, other.finish, other.version, other.newest)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5)
        assert one.kept == other.kept
        assert one.temperature == pytest.approx(other.temperature, abs=1e-5)
