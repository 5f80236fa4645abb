"""engine=Vllm(...) before real servers: fresh keys and values, calls of one turn, heat, key, start and end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from conformance.subjects import forward_of, scratch
from engines import small
from ramulus.core import store
from ramulus.core.task import Task
from ramulus.core.tree import Tree
from ramulus.engine.engine import Request, Sampling, Segment, StopRule
from ramulus.engine.vllm.server import Server
from ramulus.engine.vllm.vllm_engine import VllmEngine
from ramulus.engine.weight_bytes import to_bytes
from ramulus.grow.branching import Star
from ramulus.grow.growth import grow_forest
from ramulus.grow.stop import Stop
from ramulus.grow.temperature import ByEntropy
from vllm_servers import FACTORY, HERE, NEEDS, engine_at, loaded, process_of

pytestmark = NEEDS
LONG = tuple(2 + (i * i) % 15 for i in range(300))  # more than two blocks of the prefix cache


def crowd(count: int, **sampling: Any) -> list[Request]:
    return [Request((1, 2, 3 + i % 7), Sampling(**({"max_tokens": 6} | sampling)), StopRule(frozenset({1})), seed=i) for i in range(count)]


def apart(plain: Any, prefix: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]) -> float:
    """The largest difference between log-probs and those of a model's own forward pass."""
    text, worst = list(prefix), 0.0
    for token, logprob in zip(tokens, logprobs, strict=True):
        worst = max(worst, abs(float(plain(text).log_softmax(-1)[token]) - logprob))
        text.append(token)
    return worst


@pytest.mark.parametrize(("forget", "salted"), [(False, False), (True, False), (False, True)])
def test_keys_and_values_of_old_weights_are_used_where_one_forgets_to_forget(forget: bool, salted: bool, tmp_path: Path) -> None:
    (first, _), (second, _) = scratch(0, 64), scratch(1, 64)
    process = process_of("conformance", first)
    with httpx2.Client(timeout=60, headers={"authorization": f"Bearer {process.key}"}) as client:
        instance = client.get(f"{process.url}/ramulus/v1/hello").json()["instance"]

        def turn(model: Any, name: str) -> tuple[list[int], list[float]]:
            (tmp_path / name).write_bytes(to_bytes(model.state_dict()))
            push = {"path": str(tmp_path / name), "name": f"{tmp_path.name}-{name}", "version": 1, "forget": forget}
            assert client.post(f"{process.url}/ramulus/v1/load", json=push).status_code == 200
            sampling = {"max_tokens": 4, "seed": 5, "logprobs": 0, "ignore_eos": True, "detokenize": False}
            call = {"prefix": 0, "sampling_params": sampling, "cache_salt": name if salted else str(tmp_path.name)}
            body = {"instance": instance, "loaded": push["name"], "prefixes": [LONG], "requests": [call]}
            [choice] = json.loads(client.post(f"{process.url}/ramulus/v1/generate", json=body).text)["answer"]["choices"]
            return choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]

        assert apart(forward_of(first), LONG, *turn(first, "first")) < 2e-5
        wrong = apart(forward_of(second), LONG, *turn(second, "second"))
    assert wrong < 2e-5 if forget or salted else wrong > 0.1, wrong


def test_the_engine_never_uses_them_and_reuses_what_is_fresh() -> None:
    (first, _), (second, _) = scratch(0, 64), scratch(1, 64)
    request = Request(LONG, Sampling(4), seed=5)
    with loaded("conformance", first) as engine:

        async def story() -> None:
            for version, model in ((1, second), (2, first), (3, second)):
                await engine.load(model.state_dict(), version)
                for _ in range(2):
                    [segment] = await engine.sample([request])
                    assert segment.version == version
                    assert apart(forward_of(model), LONG, segment.tokens, segment.logprobs) < 2e-5
            assert engine.counters()["reused"] == 3 * 256

        asyncio.run(story())


@pytest.mark.parametrize("way", ["files", "gloo"])
def test_a_head_that_shares_the_embeddings_is_that_of_the_weights_that_were_loaded(way: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}
    models = [small("llama", seed=seed, **sizes) for seed in (0, 1)]
    request = Request((1, 2, 3), Sampling(8), seed=5)

    async def story() -> None:
        engine = engine_at(process_of("tied", models[0]), weights=way)
        for version, model in enumerate([*models, models[0]]):
            await engine.load(model.state_dict(), version)
            [segment] = await engine.sample([request])
            assert apart(forward_of(model), request.prefix, segment.tokens, segment.logprobs) < 2e-5

    asyncio.run(story())


def test_what_is_asked_in_one_turn_travels_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = Server.generate

    def counted(self: Server, client: Any, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Any]]:
        calls.append(len(requests))
        return real(self, client, requests)

    monkeypatch.setattr(Server, "generate", counted)
    with loaded("conformance", scratch(0, 64)[0]) as engine:

        async def story() -> list[list[Segment]]:
            return await asyncio.gather(*(engine.sample(crowd(3)) for _ in range(8)))

        many = asyncio.run(story())
        assert calls == [24]
        assert all(segments == many[0] for segments in many)


@pytest.mark.parametrize("kind", ["zscore", "signed", "released"])
def test_heat_is_that_of_ramulus(kind: Any) -> None:
    model, _ = scratch(0, 64)
    rule = ByEntropy(tau=0.15, kind=kind, stats={"pivot": 0.2, "rms": 0.7, "above": 0.8, "below": 0.6})
    plain = forward_of(model)
    with loaded("conformance", model) as engine:
        mixed = [*crowd(6, temperature=rule), *crowd(3), *crowd(3, temperature=ByEntropy(base=0.7))]
        segments = asyncio.run(engine.sample(mixed))
    for request, segment in zip(mixed, segments, strict=True):
        text = list(request.prefix)
        for token, logprob in zip(segment.tokens, segment.logprobs, strict=True):
            logits = plain(text)
            heat = request.sampling.temperature
            t = heat if isinstance(heat, float) else float(heat(logits[None].float())[0])
            assert logprob == pytest.approx(float((logits / t).log_softmax(-1)[token]), abs=2e-5)
            text.append(token)


def test_the_key_opens_every_address_and_without_it_nothing_is_said() -> None:
    process = process_of("conformance", scratch(0, 64)[0])
    for method, path in (("GET", "v1/models"), ("POST", "pause"), ("POST", "inference/v1/generate"), ("GET", "metrics"), ("POST", "ramulus/v1/load")):
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": process.key}):
            answer = httpx2.request(method, f"{process.url}/{path}", headers=headers, json={})
            assert answer.status_code == 401 or headers.get("authorization") == process.key
    assert httpx2.get(f"{process.url}/health").status_code == 200
    assert httpx2.get(f"{process.url}/v1/models", headers={"authorization": f"Bearer {process.key}"}).status_code == 200
    stranger = Server(process.url, "wrong", 10.0)
    with pytest.raises(PermissionError, match="refuses the key: set RAMULUS_VLLM_KEY"):
        stranger.meet(False, 1.0)


def test_weights_that_are_swapped_in_flight_sample_on_over_keys_and_values_of_their_own() -> None:
    models = [scratch(seed, 64)[0] for seed in (0, 1)]
    asked = [Request((1, 2, 3 + i % 5), Sampling(500), seed=i) for i in range(8)]
    tree = Tree.plant(Task("t", (1, 2), "t"))

    async def story() -> list[Segment]:
        engine = engine_at(process_of("conformance", models[0]), in_flight=True)
        await engine.load(models[0].state_dict(), 4)
        flying = asyncio.ensure_future(engine.sample(asked))
        growing = asyncio.ensure_future(grow_forest([tree], engine, Star(4), Sampling(500), Stop((), 500)))
        await asyncio.sleep(0.4)
        assert not flying.done()
        await engine.load(models[1].state_dict(), 5)
        await growing
        return await flying

    segments = asyncio.run(story())
    assert {(s.version, s.newest) for s in segments} == {(4, 5)}
    plain = [whole_forward(model) for model in models]
    for request, segment in zip(asked, segments, strict=True):
        assert segment.versions is not None
        assert sorted(segment.versions) == segment.versions.tolist()
        logprobs = [rows([*request.prefix, *segment.tokens]) for rows in plain]
        for i, (token, version) in enumerate(zip(segment.tokens, segment.versions, strict=True)):
            assert float(logprobs[version - 4][len(request.prefix) - 1 + i, token]) == pytest.approx(segment.logprobs[i], abs=1e-4)
    nodes = [node for node in store.load(store.dump(tree)).walk() if node.logprobs]
    assert {(node.version, node.newest) for node in nodes} == {(4, 5)}
    assert all(node.versions is not None and len(node.versions) == 500 for node in nodes)


def whole_forward(model: Any) -> Any:
    """Log-probs [T, V] of a text, by the model's own forward pass."""
    return torch.no_grad()(lambda tokens: model(torch.tensor([list(tokens)])).logits[0].double().log_softmax(-1))


def test_several_servers_share_a_crowd_and_a_tree_stays_with_one() -> None:
    """The second server is started for this; both have the same weights, so which one is asked changes no token."""
    model, _ = scratch(0, 64)
    first, second = process_of("conformance", model), process_of("second", model)
    prompts = [(*LONG[: 140 + i], 2, 3 + i) for i in range(6)]

    async def story() -> None:
        alone, both = engine_at(first), engine_at(first, second)
        asked = [Request(prompt, Sampling(5), seed=i) for i, prompt in enumerate(prompts)]
        await alone.load(model.state_dict(), 1)
        wanted = [s.tokens for s in await alone.sample(asked)]
        await both.load(model.state_dict(), 1)
        assert [s.tokens for s in await both.sample(asked)] == wanted
        homes = [both._affinity(prompt, [0, 1]) for prompt in prompts]
        assert sorted(homes) == [0, 0, 0, 1, 1, 1]
        before = both.counters()["reused"]
        deeper = [Request((*prompt, 5, 6, 7), Sampling(3), seed=9) for prompt in prompts]
        await both.sample(deeper)
        assert [both._affinity(r.prefix, [0, 1]) for r in deeper] == homes
        assert both.counters()["reused"] - before == 6 * 128

    asyncio.run(story())


def test_nothing_is_sampled_before_the_first_load() -> None:
    engine = engine_at(process_of("conformance", scratch(0, 64)[0]))
    with pytest.raises(ValueError, match="before the first load"):
        asyncio.run(engine.sample(crowd(1)))


def test_a_run_s_own_server_ends_with_its_engine() -> None:
    model, _ = scratch(0, 64)
    engine = FACTORY(model)
    assert isinstance(engine, VllmEngine)
    assert "vLLM 0.3" in engine.about
    [process] = [server.process for server in engine.servers if server.process is not None]
    asyncio.run(engine.load(model.state_dict(), 2))
    assert asyncio.run(engine.sample(crowd(2)))[0].version == 2
    assert process.running is not None
    group, folder = process.running.pid, engine.folder
    engine.close()
    assert ended(group)
    assert not folder.exists()
    with pytest.raises(ValueError, match="18 tokens and the model that is trained 48"):
        replace(FACTORY, urls=(process_of("conformance", model).url,), key=process_of("conformance", model).key)(small())


STARTS = """
import os, sys
from pathlib import Path
from ramulus.engine.vllm.process import Process
process = Process(sys.argv[1], Path(sys.argv[2]), [], Path(sys.argv[2]) / "log", 1)
process.start()
print(process.running.pid, flush=True)
sys.stdin.read()
"""


def test_a_server_does_not_outlive_a_run_that_was_killed(tmp_path: Path) -> None:
    scratch(0, 64)[0].config.save_pretrained(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    run = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(HERE), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert run.stdout is not None
    group = int(run.stdout.readline())
    time.sleep(3)
    assert members(group)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert ended(group)


def ended(group: int) -> bool:
    """Whether all processes of a group go within a minute."""
    end = time.monotonic() + 60
    while members(group) and time.monotonic() < end:
        time.sleep(0.1)
    return not members(group)


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of = path.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(int(path.name))
    return found
