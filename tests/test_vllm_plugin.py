"""The plug-in in vLLM's own environment, without a server: temperatures by both logits-processor interfaces, weights that are not whole."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ramulus.engine.remote.wire import rule_to_json
from ramulus.grow.temperature import ByEntropy
from vllm_servers import HERE, NEEDS

pytestmark = NEEDS
STATS = {"pivot": 0.2, "rms": 0.7, "above": 0.8, "below": 0.6}
RULES = [ByEntropy(tau=0.15, kind=kind, stats=STATS) for kind in ("zscore", "signed", "released")] + [ByEntropy(base=0.7)]  # type: ignore[arg-type]

HEATS = """
import json, sys
from types import SimpleNamespace
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

name = "ramulus_vllm.heat:Heat"
[first], [second] = _load_logitsprocs_by_fqcns([name]), _load_v2_logitsprocs_by_fqcns([name])
assert first is second
asked = json.load(sys.stdin)
logits = torch.tensor(asked["logits"])
params = [SamplingParams(extra_args={"ramulus_temperature": rule} if rule else None) for rule in asked["rules"]]
for one in params:
    first.validate_params(one)
rows = first(None, torch.device("cpu"), False)  # rows of the batch, which come, go and move
rows.update_state(BatchUpdate(len(params), [], [(i, one, None, []) for i, one in enumerate(params)], []))
rows.update_state(BatchUpdate(len(params), [], [], [(0, 1, MoveDirectionality.SWAP)]))
swapped = logits.clone()
swapped[[0, 1]] = swapped[[1, 0]]
by_rows = rows.apply(swapped)
by_rows[[0, 1]] = by_rows[[1, 0]]
slots = first(None, SimpleNamespace(max_num_reqs=64))  # slots of requests, which are used again
for i, one in enumerate(params):
    slots.add_request(40 - i, params[0])
    slots.add_request(40 - i, one)
mapping = torch.tensor([40 - i for i in range(len(params))])
by_slots = slots.apply(logits.clone(), SimpleNamespace(expanded_idx_mapping=mapping))
refused = []
for wrong in ({"rule": "Popen", "fields": {}}, {"rule": "ByEntropy", "fields": {"taus": 1}}, {"fields": {}}, 3):
    try:
        first.validate_params(SamplingParams(extra_args={"ramulus_temperature": wrong}))
    except ValueError as error:
        refused.append(str(error))
print(json.dumps([by_rows.tolist(), by_slots.tolist(), refused]))
"""

CHECKS = """
import json, sys
from ramulus_vllm.weights import checked, checksum, files
said = []
for path, crc in json.load(sys.stdin):
    try:
        checked(path, checksum(files(path)) if crc == "right" else crc)
        said.append("")
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


ADMITS = """
import asyncio, json, os, sys
from types import SimpleNamespace
from ramulus_vllm.gate import Gate

async def inner(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})

async def asked(key, expose, peer, path, given):
    os.environ.pop("VLLM_API_KEY", None)
    os.environ.pop("RAMULUS_EXPOSE", None)
    os.environ.update({"VLLM_API_KEY": key} if key else {}, **({"RAMULUS_EXPOSE": "1"} if expose else {}))
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=None)))
    headers = [(b"authorization", f"Bearer {given}".encode())] if given else []
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": (peer, 5), "app": app}
    said = []
    async def send(message):
        said.append(message)
    await Gate(inner)(scope, None, send)
    return said[0]["status"]

print(json.dumps([asyncio.run(asked(*case)) for case in json.load(sys.stdin)]))
"""


def there(program: str, asked: Any) -> Any:
    """What a program in vLLM's environment prints."""
    done = subprocess.run([str(HERE.absolute()), "-c", program], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_temperatures_are_those_of_ramulus_by_both_interfaces() -> None:
    rules = [*RULES, None, *RULES]
    logits = 3 * torch.randn(len(rules), 50, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([row / (1.0 if rule is None else rule(row[None])[0]) for row, rule in zip(logits, rules, strict=True)])
    asked = {"logits": logits.tolist(), "rules": [None if rule is None else rule_to_json(rule) for rule in rules]}
    by_rows, by_slots, refused = there(HEATS, asked)
    assert torch.allclose(torch.tensor(by_rows), wanted, atol=1e-5)
    assert torch.allclose(torch.tensor(by_slots), wanted, atol=1e-5)
    assert "does not know the temperature rule 'Popen': it knows ByEntropy" in refused[0]
    assert len(refused) == 4
    assert all("no temperature rule" in text for text in refused[1:])


def test_weights_that_are_not_whole_are_seen(tmp_path: Path) -> None:
    good, cut, empty = tmp_path / "good.safetensors", tmp_path / "cut.safetensors", tmp_path / "empty.safetensors"
    save_file({"a": torch.ones(100)}, good)
    cut.write_bytes(good.read_bytes()[:-4])
    empty.write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    asked = [(good, None), (good, "right"), (good, 1), (cut, None), (empty, None), (tmp_path / "nothing", None), (tmp_path / "no", None)]
    said = there(CHECKS, [(str(path), crc) for path, crc in asked])
    assert said[:2] == ["", ""]
    assert "are not those that were sent" in said[2]
    assert all("are not whole" in text for text in said[3:5])
    assert all("sees no safetensors at" in text for text in said[5:])


def test_who_has_no_key_is_admitted_nowhere_and_a_server_without_one_answers_its_own_machine_alone() -> None:
    cases = {
        ("key", False, "127.0.0.1", "/pause", "key"): 200,
        ("key", False, "10.0.0.9", "/pause", "key"): 200,
        ("key", False, "127.0.0.1", "/pause", ""): 401,
        ("key", True, "127.0.0.1", "/pause", "keys"): 401,
        ("key", False, "10.0.0.9", "/update_weights", "other"): 401,
        ("key", False, "10.0.0.9", "/health", ""): 200,
        ("", False, "127.0.0.1", "/pause", ""): 200,
        ("", False, "::1", "/v1/models", ""): 200,
        ("", False, "10.0.0.9", "/pause", ""): 403,
        ("", False, "10.0.0.9", "/v1/models", "guess"): 403,
        ("", False, "nonsense", "/v1/models", ""): 403,
        ("", True, "10.0.0.9", "/pause", ""): 200,
    }
    assert there(ADMITS, list(cases)) == list(cases.values())


@pytest.mark.parametrize(("version", "fits"), [("0.30.9", False), ("0.31.0", True), ("0.33.4", True), ("0.34.0", False), ("1.32.0", False)])
def test_the_window_of_versions(version: str, fits: bool) -> None:
    program = "import json, sys; from ramulus_vllm.serve import fits; print(json.dumps(fits(json.load(sys.stdin))))"
    assert there(program, version) is fits
