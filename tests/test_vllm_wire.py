"""What travels to vLLM servers and back, without one: requests, answers that cannot be, affinity, and what a recipe may say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from array import array
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.subjects import scratch
from ramulus.engine.affinity import Affinity
from ramulus.engine.engine import Request, Sampling, StopRule
from ramulus.engine.pushed import pushed
from ramulus.engine.vllm.factory import Vllm
from ramulus.engine.vllm.process import Process
from ramulus.engine.vllm.server import Server, greeting_of
from ramulus.engine.vllm.wire import Malformed, calls_of, refuse, segment_of
from ramulus.grow.temperature import ByEntropy
from ramulus.run.config.describe import recipe_text, to_json

REQUEST = Request((1, 2), Sampling(3), StopRule(frozenset({0})), seed=2**63 + 5)
GREETING = {
    "protocol": 1, "vllm": "0.32.0", "instance": "a", "loaded": "", "vocabulary": 18, "limit": 64, "rules": True,
    "logprobs": "processed_logprobs", "transfer": "ramulus",
}  # fmt: skip


def answer(tokens: list[int], logprobs: list[Any], finish: str = "length", versions: Any = None) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": logprob} for token, logprob in zip(tokens, logprobs)]
    choice = {"token_ids": tokens, "logprobs": {"content": content}, "finish_reason": finish, "weight_versions": versions}
    return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 1}}}


def spans(*parts: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [dict(zip(("version", "start", "end"), part)) for part in parts]


def test_a_shared_prefix_is_said_once_and_a_seed_has_63_bits() -> None:
    content = json.loads(json.dumps(calls_of([REQUEST, REQUEST, replace(REQUEST, prefix=(1,))], "salt")))
    assert content["prefixes"] == [[1, 2], [1]]
    assert [call["prefix"] for call in content["requests"]] == [0, 0, 1]
    sampled = content["requests"][0]["sampling_params"]
    assert (sampled["seed"], sampled["stop_token_ids"], sampled["logprobs"]) == (5, [0], 0)
    assert content["requests"][0]["cache_salt"] == "salt"


def test_a_rule_travels_by_its_fields() -> None:
    rule = ByEntropy(stats={"pivot": 0.1, "rms": 0.5, "above": 1.0, "below": 1.0})
    [call] = calls_of([replace(REQUEST, sampling=Sampling(3, rule))], "salt")["requests"]
    assert call["sampling_params"]["temperature"] == 1.0
    assert call["sampling_params"]["extra_args"]["ramulus_temperature"]["fields"]["stats"]["pivot"] == 0.1


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (replace(REQUEST, prefix=()), "prefix of a request is empty"),
        (replace(REQUEST, prefix=(18,)), "token 18 of the prefix is outside"),
        (replace(REQUEST, sampling=Sampling(63)), "lower max_tokens"),
        (replace(REQUEST, until=lambda tokens: None), "ask them of what comes back"),
        (replace(REQUEST, stop=StopRule(strings=("a",))), "ask them of what comes back"),
        (replace(REQUEST, sampling=Sampling(3, 0.001)), "0.01 and above, not at 0.001"),
        (replace(REQUEST, sampling=Sampling(3, lambda logits: logits)), "know the temperature rule ByEntropy, and not function"),
    ],
)
def test_what_no_server_can_serve_is_refused(request_: Request, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse(request_, 64, 18, True)


def test_an_answer_becomes_a_segment() -> None:
    old = answer([4, 0], [-1.0, -0.5], "stop")  # as vLLM 0.31 has it
    for entry in old["choices"][0]["logprobs"]["content"]:
        entry["token"] = f"token_id:{entry.pop('token_id')}"
    assert segment_of(old, REQUEST, 18)[0].logprobs == array("f", [-1.0, -0.5])
    segment, reused = segment_of(answer([4, 0], [-1.0, -0.5], "stop", spans(("3", 0, 2))), REQUEST, 18)
    assert (segment.tokens, segment.logprobs, segment.finish) == (array("i", [4, 0]), array("f", [-1.0, -0.5]), "eos")
    assert (segment.version, segment.newest, segment.temperature, segment.entropy, reused) == (3, 3, 1.0, None, 1)
    greedy, _ = segment_of(answer([4, 0], [-1.0, -0.5]), replace(REQUEST, sampling=Sampling(3, 0.0)), 18)
    assert greedy.logprobs.tolist() == [0.0, 0.0]


FINE = answer([4, 5, 6], [-1.0, -2.0, -3.0], versions=spans(("3", 0, 3)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, c: a.pop("choices"), "no answer"),
        (lambda a, c: c.pop("logprobs"), "no answer"),
        (lambda a, c: c.update(token_ids=None), "no answer"),
        (lambda a, c: c["logprobs"]["content"].pop(), "3 tokens with 2 log-probs"),
        (lambda a, c: c["logprobs"]["content"].append(c["logprobs"]["content"][0]), "3 tokens with 4 log-probs"),
        (lambda a, c: c["logprobs"]["content"][1].update(token_id=7), "of other tokens"),
        (lambda a, c: c["logprobs"]["content"][1].update(logprob=-9999.0), "no numbers"),
        (lambda a, c: c["logprobs"]["content"][1].update(logprob=math.nan), "no numbers"),
        (lambda a, c: c["logprobs"]["content"][1].update(logprob=None), "no numbers"),
        (lambda a, c: c["logprobs"]["content"][1].update(logprob=0.5), "no numbers"),
        (lambda a, c: c.update(finish_reason="abort"), "broken off"),
        (lambda a, c: a.update(answer([4, 5, 6, 7], [-1.0] * 4)), "1 to 3 were asked for"),
        (lambda a, c: a.update(answer([], [])), "1 to 3 were asked for"),
        (lambda a, c: a.update(answer([4, 5], [-1.0] * 2)), "end elsewhere"),
        (lambda a, c: a.update(answer([4, 0, 5], [-1.0] * 3)), "end elsewhere"),
        (lambda a, c: a.update(answer([4, 5, 18], [-1.0] * 3)), "outside the vocabulary"),
        (lambda a, c: c.update(weight_versions=spans(("3", 0, 2))), "versions of other tokens"),
        (lambda a, c: c.update(weight_versions=spans(("3", 0, 2), ("4", 1, 3))), "versions of other tokens"),
    ],
)
def test_an_answer_that_cannot_be_is_seen(change: Any, said: str) -> None:
    assert segment_of(FINE, REQUEST, 18)[0].newest == 3
    wrong = deepcopy(FINE)
    change(wrong, wrong["choices"][0])
    with pytest.raises(Malformed, match=said):
        segment_of(wrong, REQUEST, 18)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vllm": "0.30.2"}, "0.31 to 0.33"),
        ({"vllm": "1.0.0"}, "0.31 to 0.33"),
        ({"protocol": 2}, "speaks protocol 2"),
        ({"logprobs": "raw_logprobs"}, "does not answer log-probs of what it samples from"),
        ({"transfer": None}, "takes no weights from files"),
        ({"limit": None, "instance": None, "vllm": "new"}, "plug-in"),
    ],
)
def test_a_server_that_cannot_be_sampled_from_is_refused(change: dict[str, Any], said: str) -> None:
    assert greeting_of(GREETING, "x").limit == 64
    with pytest.raises(ConnectionError, match=said):
        greeting_of(GREETING | change, "x")
    with pytest.raises(ConnectionError, match="no vLLM server with ramulus's plug-in"):
        greeting_of(None, "x")


def test_affinity_spreads_new_texts_and_keeps_families_together() -> None:
    affinity = Affinity()
    prompts = [(1, 2, n) for n in range(8)]
    homes = [affinity(prompt, [0, 1]) for prompt in prompts]
    assert sorted(homes) == [0] * 4 + [1] * 4
    assert [affinity((*prompt, 9, 9), [0, 1]) for prompt in prompts] == homes
    assert {affinity(prompt, [1]) for prompt in prompts} == {1}, "a server that is away is not asked"


def test_weights_are_written_whole_and_known_again(tmp_path: Path) -> None:
    weights = pushed({"a": torch.ones(3)}, 4, tmp_path)
    assert (weights.version, weights.path.parent) == (4, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    weights.drop()
    assert not weights.path.exists()
    with pytest.raises(ValueError, match="no safetensors"):
        pushed(tmp_path, 1, tmp_path)
    with pytest.raises(ValueError, match="in place"):
        pushed(None, 1, tmp_path)
    with pytest.raises(OSError, match=r"make room, or name another engine\.folder"):
        pushed({"a": torch.ones(3)}, 4, tmp_path / "nothing")


def test_what_a_recipe_says_is_checked_and_its_key_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Vllm(urls=("http://127.0.0.1:9",), key="a secret", reconnect=0.2)
    for text in (repr(engine), json.dumps(to_json(engine)), recipe_text(engine)):
        assert "a secret" not in text
        assert "127.0.0.1:9" in text
    with pytest.raises(ConnectionError, match=r"no vLLM server answers at http://127.0.0.1:9 .*ramulus_vllm.serve"):
        engine.met()
    monkeypatch.setenv("RAMULUS_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match="run `make vllm`"):
        Vllm().interpreter()
    for wrong, said in (({"servers": 0}, "servers"), ({"urls": "http://x"}, "tuple"), ({"urls": ("x",)}, "tuple"), ({"timeout": 0}, "timeout")):
        with pytest.raises(ValueError, match=said):
            Vllm(**wrong)  # type: ignore[arg-type]


class Begun:
    """Servers that are started: processes that sleep, and what each says of itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, greetings: list[dict[str, Any]], fails: str = "") -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        words = iter(greetings)

        def start(process: Process) -> None:
            process.running = subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE, start_new_session=True)
            self.processes.append(process.running)

        def wait(process: Process, answers: Any) -> None:
            if fails:
                raise RuntimeError(fails.format(log=process.log))

        def meet(server: Server, expose: bool, patience: float) -> None:
            server.hello = greeting_of(GREETING | next(words), server.url)

        monkeypatch.setattr(Process, "start", start)
        monkeypatch.setattr(Process, "wait", wait)
        monkeypatch.setattr(Server, "meet", meet)

    def ended(self) -> bool:
        """Whether no process is left; one that is goes now."""
        left = [process for process in self.processes if process.poll() is None]
        for process in left:
            process.kill()
            process.wait()
        return not left


REFUSALS: list[tuple[dict[str, Any], list[dict[str, Any]], type[Exception], str]] = [
    ({"in_flight": True}, [{"vllm": "0.31.0"}] * 2, ValueError, "does not say which weights"),
    ({"weights": "gloo"}, [{}] * 2, ValueError, "takes no weights by gloo"),
    ({}, [{}, {"limit": 32}], ConnectionError, "is not like that at"),
    ({}, [{"vocabulary": 7}] * 2, ValueError, "serve the same model"),
    ({}, [{}, {"protocol": 7}], ConnectionError, "speaks protocol 7"),
    ({"python": "/nowhere/python"}, [{}] * 2, FileNotFoundError, "run `make vllm`"),
    ({"urls": ("http://127.0.0.1:9",)}, [{"vllm": "0.1.0"}], ConnectionError, "install one of those"),
    ({"urls": ("http://127.0.0.1:9",), "in_flight": True}, [{"vllm": "0.31.0"}], ValueError, "does not say which weights"),
]


@pytest.mark.parametrize(("options", "greetings", "kind", "text"), REFUSALS)
def test_servers_that_are_refused_are_ended_and_leave_no_folder(
    options: dict[str, Any], greetings: list[dict[str, Any]], kind: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Begun(monkeypatch, greetings)
    factory = Vllm(**{"servers": 2, "python": sys.executable, "folder": str(tmp_path)} | options)
    with pytest.raises(kind, match=text):
        factory(scratch(0)[0])
    assert len(begun.processes) == (0 if "urls" in options or "/nowhere" in options.get("python", "") else 2)
    assert begun.ended()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_stays_where_a_message_names_a_log_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun(monkeypatch, [{}] * 2, "it ended while it started (all of it: {log})")
    with pytest.raises(RuntimeError, match="it ended while it started") as failed:
        Vllm(servers=2, python=sys.executable, folder=str(tmp_path))(scratch(0)[0])
    [folder] = tmp_path.iterdir()
    assert f"{folder}/server-0.log" in str(failed.value)
    assert begun.ended()


def test_servers_that_fit_go_on_until_the_engine_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scratch(0)[0]
    begun = Begun(monkeypatch, [{"vocabulary": int(model.config.vocab_size)}] * 2)
    engine = Vllm(servers=2, python=sys.executable, folder=str(tmp_path))(model)
    assert [process.poll() for process in begun.processes] == [None, None]
    engine.close()
    assert begun.ended()
    assert list(tmp_path.iterdir()) == []
