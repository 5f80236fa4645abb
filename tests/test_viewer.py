"""`ramulus view`: a real server on a free port, asked as a browser would, and as one should not."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette")

from rich.console import Console

from ramulus.cli import main
from ramulus.core import store
from ramulus.core.tree import column
from ramulus.engine.remote import listen
from ramulus.engine.remote.listen import bind
from ramulus.look.viewer.about import model_name
from ramulus.look.viewer.api import Api
from ramulus.look.viewer.page import everything, one_file
from ramulus.look.viewer.page import write_page as write_page
from ramulus.look.viewer.runs import Shelf
from ramulus.look.viewer.show import show
from ramulus.look.viewer.viewer import Hosts, server
from viewer_runs import NASTY, add_rows, large_tree, row, run_folder, small_tree, tokenizer, write


@dataclass
class Client:
    """Asks a running server."""

    port: int

    def raw(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        made.putrequest(method, path, skip_host=True)
        for name, value in ({"Host": f"127.0.0.1:{self.port}"} | headers).items():
            made.putheader(name, value)
        made.endheaders()
        answer = made.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        made.close()
        return found

    def __call__(self, name: str, want: int = 200, /, **parameters: object) -> Any:
        status, _, body = self.raw(f"/api/{name}" + (f"?{urlencode(parameters)}" if parameters else ""))
        assert status == want, body
        return json.loads(body)


Serve = Callable[..., Client]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Starts servers in threads; all end with the module."""
    ends: list[tuple[Any, threading.Thread, Any]] = []

    def start(*given: Path, host: str = "127.0.0.1", tokenizer: Path | None = None) -> Client:
        ready, bound = threading.Event(), bind(host, 0)
        made = server(Api(Shelf(given, tokenizer)), host, bound, lambda address: ready.set())
        thread = threading.Thread(target=made.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        ends.append((made, thread, bound))
        return Client(bound.getsockname()[1])

    yield start
    for made, thread, bound in ends:
        made.should_exit = True
        thread.join(10)
        bound.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def client(serve: Serve, folder: Path) -> Client:
    return serve(folder)


def test_runs(client: Client, folder: Path) -> None:
    [one] = client("runs")
    known = {"title": "one", "folder": str(folder), "step": 10, "steps": 20, "trees": [5, 10], "live": True, "tokenizer": True}
    known |= {"recipe": "treepo", "model": "Qwen2.5-0.5B", "status": "live", "reward": 1.0, "seconds": 10.0, "seed": 3, "group": None}
    assert one.pop("id").startswith("one-")
    assert abs(one.pop("started") - time.time()) < 600
    assert one == known


def test_metrics_are_flat_and_begin_after_a_step(client: Client) -> None:
    rows = client("metrics", run="one", after=8)
    assert [row["step"] for row in rows] == [9, 10]
    assert rows[0]["seconds/grow"] == 0.5
    assert len(client("metrics", run="one")) == 10


def test_config(client: Client) -> None:
    found = client("config", run="one")
    assert found["branching"] == "Segments"
    assert (found["branching.width"], found["branching.sizes"], found["branching.seeds"]) == (8, "3, 6", None)
    assert (found["rewards.0"], found["rewards.0.weight"]) == ("Boxed", 2.0)


def test_ledger(client: Client) -> None:
    assert client("ledger", run="one")["steps"] == 10


def test_steps(client: Client) -> None:
    first, second = client("steps", run="one", step=5)
    assert (first["index"], first["task"], first["text"], first["visit"]) == (0, "task-1+1?", "1+1?", 1)
    assert (first["paths"], first["correct"], first["pass_rate"]) == (4, 1, pytest.approx(1 / 3))
    assert first["spread"] == pytest.approx((2 / 9) ** 0.5)
    assert first["tokens"] == 2 + 2 + 2 + 2 + 3 + 4 + 6
    assert first["reuse"] == pytest.approx((6 + 6 + 5 + 4) / 15)
    assert first["length"] == pytest.approx((6 + 6 + 5 + 4) / 4)
    assert set(first["flags"]) == {"pruned", "rebranched", "demonstration", "mixed"}
    assert first["skeleton"][0] == [-1, 0, 4, 5, 0.5]
    assert first["skeleton"][1] == [0, 4, 2, 3, pytest.approx(1 / 3, abs=1e-6)]
    assert second["text"] == "what is ü at 5?"


def test_tree(client: Client) -> None:
    tree = client("tree", run="one", step=5, index=0)
    assert tree["task"] == {"id": "task-1+1?", "text": "1+1?", "answer": "2"}
    assert (tree["seed"], tree["visit"], tree["rounds"]) == (7, 1, 3)
    nodes = tree["nodes"]
    assert [node["text"] for node in nodes] == ["1+1?", "ab", "c=", "2<eos>", "3<eos>", "xyz", "dead", "abc=2<eos>"]
    assert [node["parent"] for node in nodes] == [-1, 0, 1, 2, 2, 1, 0, 0]
    assert [node["start"] for node in nodes] == [0, 4, 6, 8, 8, 6, 4, 4]
    assert [node["why"] for node in nodes][1:6] == ["first", "continues", "branch", "branch", "fallback"]
    assert [node["author"] for node in nodes][5:] == ["policy", "policy", "expert"]
    assert [node["leaves"] for node in nodes] == [5, 3, 2, 1, 1, 1, 1, 1]
    assert nodes[3]["verdict"]["answer"] == "2"
    assert nodes[6]["finish"] == "pruned"
    assert nodes[6]["value"] is None
    assert set(tree["columns"]) >= {"gain", "pain", "entropy", "logprobs", "temperature", "kept", "credit/SubgroupMean"}


def test_gain_and_pain_are_the_credit_of_the_leaves_below(client: Client) -> None:
    nodes = client("tree", run="one", step=5, index=0)["nodes"]
    means = [node["means"] for node in nodes]
    assert (means[2]["gain"], means[2]["pain"], means[2]["credit/SubgroupMean"]) == (0.25, -0.75, -0.5)
    assert means[1]["gain"] == pytest.approx(0.5 / 3, abs=1e-6)
    assert means[1]["pain"] == pytest.approx(-2.5 / 3, abs=1e-6)
    assert "gain" not in means[6], "a pruned path has no credit"


def test_node(client: Client) -> None:
    nodes = client("tree", run="one", step=5, index=0)["nodes"]
    found = client("node", run="one", step=5, index=0, node=nodes[3]["id"])
    assert found["pieces"] == ["2", "<eos>"]
    assert found["prefix"] == "1+1?abc="
    assert found["columns"]["logprobs"] == [-0.5, -0.51]
    assert found["columns"]["gain"] == [0.5, 0.5]


def test_leaf(client: Client) -> None:
    nodes = client("tree", run="one", step=5, index=0)["nodes"]
    found = client("leaf", run="one", step=5, index=0, node=nodes[3]["id"])
    said = {"problem": "1+1?", "text": "abc=2", "answer": "2", "extracted": "2", "reward": 1.0, "finish": "eos"}
    assert found.items() >= (said | {"tokens": 6, "nodes": [0, 1, 2, 3]}).items()
    assert "no leaf" in client("leaf", 400, run="one", step=5, index=0, node=nodes[1]["id"])["error"]


def test_search(client: Client) -> None:
    found = client("search", run="one", q="XYZ")
    assert [(one["step"], one["index"]) for one in found] == [(10, 0), (10, 1), (5, 0), (5, 1)]
    assert found[0]["excerpt"][found[0]["at"] :][: found[0]["length"]] == "xyz"
    assert len(client("search", run="one", q="xyz", limit=3)) == 3
    assert [one["step"] for one in client("search", run="one", q="Ü at 5")] == [5]
    assert client("search", run="one", q="not in there") == []


def test_evaluations(client: Client) -> None:
    rows = client("evals", run="one")
    assert [(row["step"], row["name"]) for row in rows] == [(5, "000005"), (10, "000010"), (10, "evaluation-after")]
    assert all("answers" not in row for row in rows)
    assert client("answers", run="one", step=5)[0]["sampled"][0]["text"] == NASTY
    assert client("answers", run="one", step=10, name="evaluation-after") == []
    assert "step 7" in client("answers", 404, run="one", step=7)["error"]


@pytest.mark.parametrize(
    ("name", "parameters", "status"),
    [
        ("metrics", {}, 400),
        ("metrics", {"run": "one", "after": "1.5"}, 400),
        ("steps", {"run": "one"}, 400),
        ("steps", {"run": "one", "step": "x" * 3000}, 400),
        ("steps", {"run": "one", "step": "9" * 40}, 400),
        ("steps", {"run": "one", "step": 6}, 404),
        ("tree", {"run": "one", "step": 5, "index": 2}, 404),
        ("tree", {"run": "one", "step": 5, "index": -1}, 404),
        ("tree", {"run": "two", "step": 5, "index": 0}, 404),
        ("node", {"run": "one", "step": 5, "index": 0, "node": 99}, 404),
        ("search", {"run": "one", "q": ""}, 400),
        ("search", {"run": "one", "q": "a", "limit": 0}, 400),
        ("config", {"run": "../one"}, 404),
        ("config", {"run": "/etc"}, 404),
        ("nothing", {}, 404),
    ],
)
def test_a_wrong_question_is_answered_with_its_error(client: Client, name: str, parameters: dict, status: int) -> None:
    assert client(name, status, **parameters)["error"]


def test_the_page_and_its_headers(client: Client) -> None:
    status, headers, body = client.raw("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"<script>" not in body, "no script in the page itself"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert "script-src" not in policy
    for path in ("/", "/assets/viewer.js", "/api/runs", "/api/none", "/nowhere"):
        headers = client.raw(path)[1]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert "access-control-allow-origin" not in headers
    assert client.raw("/api/runs")[1]["cache-control"] == "no-store"
    assert client.raw("/assets/viewer.css")[1]["content-type"].startswith("text/css")


@pytest.mark.parametrize(
    "path",
    [
        "/../run.json",
        "/assets/../viewer.py",
        "/assets/..%2fviewer.py",
        "/assets/%2e%2e/viewer.py",
        "/assets//etc/passwd",
        "/assets/viewer.py",
        "/assets/",
        "/assets/viewer.html%00.js",
        "/run.json",
        "//etc/passwd",
    ],
)
def test_paths_lead_nowhere(client: Client, path: str) -> None:
    assert client.raw(path)[0] == 404


FOREIGN = ["evil.example", "evil.example:{port}", "127.0.0.1.evil:{port}", "localhost.evil", "10.0.0.1:{port}", ""]
TWISTED = ["localhost:x", "localhost:1:2", "[::1", "localhost:1@evil.example"]


@pytest.mark.parametrize("host", [*FOREIGN, *TWISTED])
def test_a_foreign_host_is_refused(client: Client, host: str) -> None:
    for path in ("/", "/api/runs"):
        status, headers, body = client.raw(path, Host=host.format(port=client.port))
        assert (status, headers["x-content-type-options"]) == (400, "nosniff")
        assert b"one" not in body.replace(b"opened", b"")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LocalHost"])
def test_this_machine_is_answered_at_any_port(client: Client, host: str) -> None:
    for port in (f":{client.port}", ":1", ""):  # ssh -L listens at another one
        assert client.raw("/api/runs", Host=host + port)[0] == 200


def test_a_given_host_is_answered() -> None:
    given = Hosts("box.lan", 81)
    assert "box.lan:81" in given
    assert "box.lan" not in given
    assert "10.0.0.1:81" not in given
    anywhere = Hosts("0.0.0.0", 81)
    assert "10.0.0.1:81" in anywhere
    assert "[fe80::1]:81" in anywhere
    assert "10.0.0.1.evil.example:81" not in anywhere
    assert "10.0.0.1" not in anywhere
    usual = Hosts("0.0.0.0", 80)
    assert "192.168.0.5" in usual, "a browser leaves port 80 out"
    assert "[fe80::1]" in usual
    assert "192.168.0.5:81" not in usual
    assert "box.lan" in Hosts("box.lan", 80)
    assert "[fe80::2]:81" in Hosts("fe80::2", 81)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_written(client: Client, method: str) -> None:
    status, headers, _ = client.raw("/api/runs", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_head_has_no_body(client: Client) -> None:
    assert client.raw("/api/runs", "HEAD")[0] == 200
    assert client.raw("/api/runs", "HEAD")[2] == b""


def test_a_run_is_read_as_it_grows(serve: Serve, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "live", steps=3, trees=())
    client = serve(folder)
    whole = json.dumps(row(4)).encode()
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(whole[:-9])
    assert [one["step"] for one in client("metrics", run="live")] == [1, 2, 3], "a torn line is left for the next time"
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(whole[-9:] + b"\n")
    assert [one["step"] for one in client("metrics", run="live", after=2)] == [3, 4]
    assert client("runs")[0]["trees"] == []
    store.write(folder / "trees" / "000004.jsonl", [small_tree(4)])
    assert client("runs")[0]["trees"] == [4]
    assert len(client("steps", run="live", step=4)) == 1
    store.write(folder / "trees" / "000004.jsonl", [small_tree(4, "more?")], append=True)
    assert [one["text"] for one in client("steps", run="live", step=4)] == ["1+1?", "more?"]


def test_a_resumed_run_repeats_steps(serve: Serve, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "again", steps=6, trees=(4, 6))
    client = serve(folder)
    assert len(client("metrics", run="again")) == 6
    kept = b"".join((folder / "metrics.jsonl").read_bytes().splitlines(True)[:3])
    (folder / "metrics.jsonl").write_bytes(kept)  # the file shrank
    assert [one["step"] for one in client("metrics", run="again")] == [1, 2, 3]
    longer = kept + b"".join(json.dumps(row(step, reward=0.99)).encode() + b"\n" for step in range(4, 10))
    client("metrics", run="again")
    add_rows(folder, range(4, 8))
    client("metrics", run="again")
    (folder / "metrics.jsonl").write_bytes(longer)  # it shrank and grew beyond what was read, between two looks
    assert [one["reward"] for one in client("metrics", run="again", after=3)] == [0.99] * 6
    client("steps", run="again", step=4)
    store.write(folder / "trees" / "000004.jsonl", [small_tree(4, "another?")])
    (folder / "trees" / "000006.jsonl").unlink()
    assert [one["text"] for one in client("steps", run="again", step=4)] == ["another?"]
    assert client("tree", run="again", step=4, index=0)["task"]["text"] == "another?"
    assert client("runs")[0]["trees"] == [4]
    assert "no trees of step 6" in client("steps", 404, run="again", step=6)["error"]


def test_torn_and_damaged_trees(serve: Serve, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "torn", trees=(5, 6, 7))
    path = folder / "trees" / "000005.jsonl"
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(lines[0] + lines[1][:200])
    (folder / "trees" / "000006.jsonl").write_bytes(lines[0] + b'{"format":1,"nodes":[]}\n' + lines[1].rstrip(b"\n"))
    client = serve(folder)
    assert len(client("steps", run="torn", step=5)) == 1
    assert [one["index"] for one in client("steps", run="torn", step=6)] == [0, 2]
    assert "cannot be read" in client("tree", 404, run="torn", step=6, index=1)["error"]
    packed = gzip.compress(b"".join(lines))
    (folder / "trees" / "000008.jsonl.gz").write_bytes(packed)
    (folder / "trees" / "000009.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert client("runs")[0]["trees"] == [5, 6, 7, 8, 9]
    assert len(client("steps", run="torn", step=8)) == 2
    assert client("tree", run="torn", step=8, index=1)["task"]["text"] == "what is ü at 5?"
    assert len(client("steps", run="torn", step=9)) < 2


ODD = {
    "mean": ("metrics.jsonl", '{"step": 1, "seconds": {"mean": "soon", "step": {"a": 1}}}\n'),
    "list": ("metrics.jsonl", '{"step": 2, "seconds": [1, {"mean": null}]}\n'),
    "huge": ("metrics.jsonl", '{"step": 3, "seconds": {"mean": 1e999}}\n'),
    "deep": ("metrics.jsonl", '{"step": 1, "x": ' + '{"a":' * 500 + "1" + "}" * 500 + "}\n"),
    "deeper": ("metrics.jsonl", '{"step": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"),
    "none": ("metrics.jsonl", '{"step": NaN}\n{"step": 1e999}\n{"step": "1"}\n[]\n'),
    "stages": ("run.json", '{"stages": [1, null, "x"]}'),
    "steps": ("run.json", '{"stages": [{"name": "a", "steps": {"a": 1}}]}'),
    "nested": ("run.json", '{"stages": ' + "[" * 100_000 + "]" * 100_000 + "}"),
}


def test_a_run_with_odd_files_hides_no_other(serve: Serve, tmp_path: Path) -> None:
    run_folder(tmp_path / "good")
    for name, (file, text) in ODD.items():
        (tmp_path / name).mkdir()
        add_rows(tmp_path / name, range(1, 2))
        (tmp_path / name / file).write_text(text)
    client = serve(tmp_path)
    said = {one["title"].rpartition("/")[2]: one for one in client("runs")}
    assert said.keys() == {"good", *ODD}
    assert said["good"]["step"] == 10
    assert {said[name]["step"] for name in ("mean", "stages", "steps", "nested")} == {1}
    for one in said.values():
        client("metrics", run=one["id"])
        client("config", run=one["id"])
        client("ledger", run=one["id"])


def test_the_list_of_runs_keeps_no_metrics(tmp_path: Path) -> None:
    for i in range(5):
        run_folder(tmp_path / f"run-{i}", steps=200)
    api = Api(Shelf([tmp_path]))
    assert {one["step"] for one in json.loads(api("runs", {}))} == {200}
    assert not any(one.metrics.rows or one.metrics.lines.spans for one in api.shelf.entries.values())
    add_rows(tmp_path / "run-0", range(201, 203))
    with open(tmp_path / "run-0" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 203, "torn')
    assert sorted(one["step"] for one in json.loads(api("runs", {}))) == [200, 200, 200, 200, 202]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"class": "ramulus.Pretrained", "path": "Qwen/Qwen2.5-7B"}, "Qwen/Qwen2.5-7B"),
        ({"class": "ramulus.Pretrained", "path": "./models/mine/"}, "mine"),
        ("runs/quickstart/1-sft", "runs/quickstart/1-sft"),
        ("/data/mine", "mine"),
        ({"class": "ramulus.ActorCritic", "model": {"class": "ramulus.Scratch"}}, "Scratch"),
        (None, None),
        ({"class": "ramulus.Scratch", "path": 7}, "Scratch"),
        ([1], None),
    ],
)
def test_a_model_has_a_name_for_people(model: Any, name: str | None) -> None:
    assert model_name(model) == name


def test_an_id_is_found_from_elsewhere_and_after_a_move(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_folder(tmp_path / "runs" / name / "seed-1")
    near = Shelf([tmp_path / "runs" / "a"]).refresh()[0].id
    wide = Shelf([tmp_path / "runs"])
    assert wide[near].title == "runs/a/seed-1"
    assert wide["runs-b-seed-1"].title == "runs/b/seed-1"
    with pytest.raises(KeyError):
        wide["seed-1"]
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert Shelf([tmp_path / "moved" / "a"])[near].title == "a/seed-1"


def test_a_given_folder_without_runs_hides_no_other(tmp_path: Path) -> None:
    good = run_folder(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no trees")
    told = json.loads(Api(Shelf([tmp_path / "empty", good, tmp_path / "note.txt"]))("runs", {}))
    assert {one["title"]: "trouble" in one for one in told} == {"empty": True, "good": False, "note.txt": True}
    assert "holds neither metrics.jsonl nor trees" in told[0]["trouble"]


def test_metrics_of_many_runs_are_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        run_folder(tmp_path / f"run-{i}", steps=200)
    size = (tmp_path / "run-0" / "metrics.jsonl").stat().st_size
    monkeypatch.setattr("ramulus.look.viewer.api.METRICS_READ", int(2.5 * size))
    api = Api(Shelf([tmp_path]))
    ids = [one["id"] for one in json.loads(api("runs", {}))]
    for run in [*ids, *ids]:
        assert len(json.loads(api("metrics", {"run": run}))) == 200
        assert json.loads(api("metrics", {"run": run, "after": "198"}))[0]["step"] == 199
    assert sum(bool(one.metrics.rows) for one in api.shelf.entries.values()) <= 3


@pytest.mark.slow
def test_500_runs_take_little_memory(tmp_path: Path) -> None:
    text = (Path(__file__).parent / "data/run-0.1/metrics.jsonl").read_text().splitlines()[0]
    saved = (Path(__file__).parent / "data/run-0.1/run.json").read_text()
    rows = "".join(json.dumps(json.loads(text) | {"step": step}) + "\n" for step in range(1, 401))
    for i in range(500):
        (tmp_path / f"run-{i}" / "trees").mkdir(parents=True)
        (tmp_path / f"run-{i}" / "metrics.jsonl").write_text(rows)
        (tmp_path / f"run-{i}" / "run.json").write_text(saved)
        for step in range(10, 401, 40):
            (tmp_path / f"run-{i}" / "trees" / f"{step:06d}.jsonl").write_text("")
    program = """
import json, sys
from pathlib import Path
from ramulus.look.viewer.about import model_name
from ramulus.look.viewer.api import Api
from ramulus.look.viewer.runs import Shelf
from ramulus.look.viewer.viewer import Hosts, application
api = Api(Shelf([Path(sys.argv[1])]))
application(api, Hosts("127.0.0.1", 1))
for one in json.loads(api("runs", {})):
    assert len(one["trees"]) == 10
    api("metrics", {"run": one["id"]}), api("ledger", {"run": one["id"]}), api("config", {"run": one["id"]})
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""
    said = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(said.stdout) < 200 * 1024, "kB"


def test_connections_on_which_nothing_happens_are_closed(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "TICK", 0.05)
    client = serve(folder)
    for said in (b"", b"GET / HTTP/1.1\r\nHost: local", b"POST /"):
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as half:
            half.sendall(said)
            assert half.recv(100) == b"", "closed by the other end"
    answered = b"GET /api/runs HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as busy:
        for _ in range(4):
            busy.sendall(answered)
            time.sleep(0.1)
            assert busy.recv(1 << 16).startswith(b"HTTP/1.1 200")
        busy.sendall(answered[:20])
        end = time.monotonic() + 10
        with contextlib.suppress(ConnectionResetError):
            while busy.recv(1 << 16):
                assert time.monotonic() < end


def test_links_that_lead_out_are_not_followed(serve: Serve, tmp_path: Path) -> None:
    folder, outside = run_folder(tmp_path / "in", trees=(5,)), run_folder(tmp_path / "out", trees=(9,))
    os.symlink(outside / "trees" / "000009.jsonl", folder / "trees" / "000009.jsonl")
    os.symlink(outside / "evaluation-after.json", folder / "evaluation-before.json")
    os.symlink(outside, folder / "more")
    (folder / "metrics.jsonl").unlink()
    os.symlink(outside / "metrics.jsonl", folder / "metrics.jsonl")
    client = serve(folder)
    [one] = client("runs")
    assert one["trees"] == [5]
    assert client("metrics", run="in") == []
    assert [row["name"] for row in client("evals", run="in")] == ["000005", "000010", "evaluation-after"]


def test_several_runs_folders_of_runs_and_loose_trees(serve: Serve, tmp_path: Path) -> None:
    for name in ("seed-10", "seed-2"):
        run_folder(tmp_path / "runs" / "grpo" / name, name="grpo")
    stages = tmp_path / "runs" / "two"
    saved = {"format": 1, "stages": [{"name": "sft", "steps": 30}, {"name": "rl", "steps": 40}]}
    for stage in ("1-sft", "2-rl"):
        run_folder(stages / stage)
        (stages / stage / "run.json").unlink()
    (stages / "run.json").write_text(json.dumps(saved))
    store.write(tmp_path / "loose" / "mine.jsonl", [small_tree(0), small_tree(2), small_tree(0, "b?")])
    store.write(tmp_path / "loose" / "packed.jsonl.gz", [small_tree(1)])
    (tmp_path / "loose" / "problems.jsonl").write_text('{"problem": "1+1?"}\n')
    client = serve(tmp_path / "runs", tmp_path / "loose")
    found = {one["title"]: one for one in client("runs")}
    assert list(found) == ["runs/grpo/seed-2", "runs/grpo/seed-10", "runs/two/1-sft", "runs/two/2-rl", "loose/mine", "loose/packed"]  # fmt: skip
    assert found["runs/two/2-rl"]["steps"] == 40
    assert client("config", run="runs-two-1-sft")["name"] == "sft"
    assert found["loose/mine"]["trees"] == [0, 2]
    assert not found["loose/mine"]["tokenizer"]
    assert [one["text"] for one in client("steps", run="loose-mine", step=0)] == ["1+1?", "b?"]
    assert client("tree", run="loose-mine", step=0, index=1)["nodes"][0]["text"] == "⟨98⟩⟨63⟩"
    assert len(client("steps", run="loose-packed", step=1)) == 1
    run_folder(tmp_path / "runs" / "later")
    deadline = time.monotonic() + 30
    while "runs/later" not in found and time.monotonic() < deadline:  # folders are looked at every few seconds
        found = {one["title"]: one for one in client("runs")}
        time.sleep(0.2)
    assert "runs/later" in found
    alike = serve(tmp_path / "runs" / "grpo" / "seed-2", run_folder(tmp_path / "runs" / "dapo" / "seed-2"))
    assert [one["title"] for one in alike("runs")] == ["grpo/seed-2", "dapo/seed-2"]
    stage = serve(stages / "2-rl", tokenizer=stages / "1-sft")
    assert stage("config", run="2-rl")["steps"] == 40
    assert stage("runs")[0]["tokenizer"]


def test_a_large_tree(serve: Serve, tmp_path: Path) -> None:
    tree = large_tree()
    store.write(tmp_path / "large.jsonl", [small_tree(0), tree, small_tree(0)])
    client = serve(tmp_path / "large.jsonl", tokenizer=run_folder(tmp_path / "other"))
    row = client("steps", run="large", step=0)[1]
    assert len(row["skeleton"]) == 200
    assert all(part[0] < i for i, part in enumerate(row["skeleton"]))
    assert row["tokens"] == sum(len(node.tokens) for node in tree.walk()) - len(tree.root.tokens) > 90_000
    found = client("tree", run="large", step=0, index=1)
    assert len(found["nodes"]) == 2000
    texts = [bytes(list(node.tokens[: -1 if list(node.tokens[-1:]) == [256] else None])).decode() for node in tree.walk()]
    assert [node["text"].removesuffix("<eos>") for node in found["nodes"]] == texts
    for i, node in enumerate(tree.walk()):
        assert found["nodes"][i]["value"] == pytest.approx(tree.value(node), abs=1e-6)
    deep = max(range(2000), key=lambda i: found["nodes"][i]["start"])
    told = client("node", run="large", step=0, index=1, node=found["nodes"][deep]["id"])
    assert "".join(told["pieces"]) == found["nodes"][deep]["text"]
    assert len(told["prefix"]) == found["nodes"][deep]["start"]


def test_numbers_that_json_cannot_say_are_null(serve: Serve, tmp_path: Path) -> None:
    tree = small_tree(0)
    leaf = write(tree, tree.root, "zz", finish="eos", reward=0.0)
    leaf.logprobs[1], leaf.verdict = float("-inf"), {"correct": 0.0, "score": float("nan")}
    leaf.signals = {"influence": column([0.5, 1.0, float("nan")], "d"), "steps": column([1.0, 0.0, 0.0], "d")}
    store.write(tmp_path / "odd.jsonl", [tree])
    client = serve(tmp_path / "odd.jsonl")
    found = client("tree", run="odd", step=0, index=0)
    assert {"influence", "signals/steps"} <= set(found["columns"])
    assert found["nodes"][-1]["verdict"]["score"] is None
    columns = client("node", run="odd", step=0, index=0, node=leaf.id)["columns"]
    assert columns["logprobs"] == [-0.5, None, -0.52]
    assert columns["influence"] == [0.5, 1.0, None]


def test_one_file_holds_every_answer_and_no_open_script(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "one", trees=())
    tree = small_tree(5, NASTY)
    write(tree, tree.root, NASTY, finish="eos", reward=0.0)
    store.write(folder / "trees" / "000005.jsonl", [tree])
    store.write(folder / "trees" / "000007.jsonl", [small_tree(7)])
    api = Api(Shelf([folder]))
    page = one_file(everything(api, [5]))
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is loaded from elsewhere"
    held = re.findall(r'<script type="application/json" id="embedded">(.*?)</script>', page, re.DOTALL)
    assert len(held) == 1
    assert NASTY not in page
    answers = json.loads(held[0])
    assert answers["/api/runs"][0]["trees"] == [5]
    run = answers["/api/runs"][0]["id"]
    assert str(tmp_path) not in held[0], "whoever gets the file learns nothing about this machine's folders"
    told = json.loads(api("tree", {"run": "one", "step": "5", "index": "0"}))
    assert answers[f"/api/tree?run={run}&step=5&index=0"] == told
    assert NASTY in told["nodes"][-1]["text"]
    for node in told["nodes"]:
        assert f"/api/node?run={run}&step=5&index=0&node={node['id']}" in answers
    last = told["nodes"][-1]["id"]
    assert answers[f"/api/leaf?run={run}&step=5&index=0&node={last}"]["text"] == NASTY
    assert {f"/api/metrics?run={run}&after=-1", f"/api/config?run={run}", f"/api/evals?run={run}", "/api/glossary"} <= answers.keys()
    assert f"/api/steps?run={run}&step=7" not in answers
    assert page.count("</script>") == page.count("<script"), "every script element is closed once"


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out + said.err


def test_the_command_writes_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = told(capsys, "view", folder, "--out", tmp_path / "page.html", "--steps", "5,10")
    assert (status, "MB in" in said) == (0, True)
    assert '"trees":' in (tmp_path / "page.html").read_text(encoding="utf-8").replace('\\"', '"')


def test_the_page_goes_into_a_new_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b" / "p.html"
    assert told(capsys, "view", folder, "--out", out)[0] == 0
    assert out.stat().st_size > 100_000
    assert [path.name for path in out.parent.iterdir()] == ["p.html"]


def test_a_page_that_cannot_be_written_is_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    api = Api(Shelf([folder]))
    api.answers = {}  # whoever asks is refused
    with pytest.raises(OSError, match=r"cannot write --out=.*file/p\.html: .*name another file"):
        write_page(api, tmp_path / "file" / "p.html", [], Console(file=StringIO()))


def test_a_page_is_text_in_any_locale(folder: Path, tmp_path: Path) -> None:
    """Nothing depends on the encoding of the machine."""
    code = "import sys; from ramulus.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:ramulus", "-c", code]
    subprocess.run([*command, "view", folder, "--out", tmp_path / "p.html"], check=True, capture_output=True)


def test_progress_is_shown_on_a_terminal_alone(folder: Path, tmp_path: Path) -> None:
    api, said = Api(Shelf([folder])), {}
    for terminal in (True, False):
        console = Console(file=StringIO(), force_terminal=terminal, width=100)
        write_page(api, tmp_path / f"{terminal}.html", [5, 10], console)
        said[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "/4" in said[True]
    assert "trees" in said[True]
    assert said[False].count("\n") == 1
    assert (tmp_path / "True.html").read_bytes() == (tmp_path / "False.html").read_bytes()


def test_an_evaluation_is_shown_with_its_tokenizer(serve: Serve, tmp_path: Path) -> None:
    """As `ramulus eval --out FOLDER` keeps it; the whole way is in the slow test below."""
    out = tmp_path / "mine"
    for name in ("chain", "chain-tree"):
        store.write(out / f"{name}.jsonl", [small_tree(0)])
    (out / "results.json").write_text("{}")
    (out / "tokenizer").mkdir()
    tokenizer().save(str(out / "tokenizer" / "tokenizer.json"))
    for given, titles in ((out, ["mine/chain-tree", "mine/chain"]), (out / "chain.jsonl", ["chain"])):
        client = serve(given)
        found = client("runs")
        assert [one["title"] for one in found] == titles
        for one in found:
            assert one["tokenizer"]
            assert client("tree", run=one["id"], step=0, index=0)["nodes"][1]["text"] == "ab"


@pytest.mark.slow
def test_a_real_evaluation_from_the_command_line(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    from ramulus.learn.policy.model import Scratch

    torch.manual_seed(0)
    net, words = Scratch("0123456789+-=?\n", hidden=16, layers=1, heads=2, kv_heads=1, max_positions=256)()
    net.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    options = ["--tasks", "chain", "--limit", 2, "--samples", 2, "--k", "1,2", "--max-tokens", 6, "--threads", 1]
    command = ["eval", tmp_path / "model", *options, "--tree", "--segment", 3, "--out"]
    assert told(capsys, *command, tmp_path / "mine")[0] == 0
    client = serve(tmp_path / "mine")
    found = {one["title"]: one["id"] for one in client("runs")}
    assert set(found) == {"mine/chain", "mine/chain-greedy", "mine/chain-tree"}
    for run in found.values():
        assert len(client("steps", run=run, step=0)) == 2
        root = client("tree", run=run, step=0, index=0)
        assert root["nodes"][0]["text"].strip() == root["task"]["text"].strip()
    assert "⟨" not in str(show(tmp_path / "mine"))
    assert told(capsys, *command, tmp_path / "a.json")[0] == 0
    for given in (tmp_path / "a.json", tmp_path / "mine", tmp_path / "mine" / "results.json"):
        client = serve(given)
        rows = [row for one in client("runs")[:1] for row in client("evals", run=one["id"])]
        assert [row["name"] for row in rows] == ["chain", "chain, trees", "chain, independent attempts at the price of the trees"]
        assert {"mean@2", "pass@2", "greedy", "intervals"} <= rows[0].keys()
        assert rows[0]["answered"] == (2 if given.name == "a.json" else 0)
        assert {row["measure"] for row in client("differences", run=client("runs")[0]["id"])} >= {"mean", "length"}
    client = serve(tmp_path / "a.json")
    assert len(client("answers", run="a", step=0, name="chain")) == 2


@pytest.mark.parametrize("given", ["2-rl", "2-rl/trees", "2-rl/trees/000010.jsonl"])
def test_a_stage_alone_finds_the_tokenizer_of_another(serve: Serve, tmp_path: Path, given: str) -> None:
    run_folder(tmp_path / "1-sft")
    shutil.rmtree(run_folder(tmp_path / "2-rl") / "checkpoints")
    [one] = serve(tmp_path / given)("runs")
    assert one["tokenizer"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["view", "{tmp}/nothing"], "there is nothing at"),
        (["view", "{tmp}"], "holds neither metrics.jsonl nor trees"),
        (["view", "{run}/run.json"], "ramulus eval --out FOLDER"),
        (["view", "{run}", "--port", "99999"], "port 99999: bind(): port must be 0-65535.; leave --port out"),
        (["view", "{run}", "--out", "{tmp}"], "is a folder: name a file in it"),
        (["view", "{run}", "--out", "{tmp}/p.html", "--steps", "6"], "no trees of step 6"),
        (["view", "{run}", "--out", "{tmp}/p.html", "--steps", "a"], "step numbers with commas"),
        (["view", "{run}", "--steps", "5"], "add --out"),
        (["view", "{run}", "--tokenizer", "{tmp}"], "no tokenizer.json"),
        (["view"], "name a run"),
    ],
)
def test_errors_name_the_remedy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], remedy: str
) -> None:
    status, said = told(capsys, *(word.format(tmp=tmp_path, run=folder) for word in words))
    assert status == 2
    assert remedy in said


@pytest.mark.slow
def test_a_real_run_from_the_command_line(tmp_path: Path) -> None:
    recipe = Path(__file__).parent / "run_small.py"
    command = [sys.executable, "-m", "ramulus.cli"]
    out = tmp_path / "real"
    paths = os.environ | {"PYTHONPATH": str(recipe.parent)}
    train = [*command, "train", f"{recipe}:attnrl", f"out={out}", "steps=2"]
    subprocess.run(train, check=True, capture_output=True, env=paths)
    viewer = subprocess.Popen([*command, "view", str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert viewer.stdout is not None
        said = viewer.stdout.readline()
        client = Client(int(re.search(r"http://127\.0\.0\.1:(\d+)/", said)[1]))  # type: ignore[index]
        [one] = client("runs")
        assert (one["step"], one["trees"], one["tokenizer"]) == (2, [1, 2], True)
        assert len(client("metrics", run="real")) == 2
        rows = client("steps", run="real", step=2)
        assert any("rebranched" in row["flags"] for row in rows)
        trees = [client("tree", run="real", step=2, index=row["index"]) for row in rows]
        tree = next(tree for tree in trees if "gain" in tree["columns"])
        assert {"influence", "gain", "pain", "credit/GlobalLocal", "entropy", "ratio"} <= set(tree["columns"])
        assert any(node["why"] == "influence" for node in tree["nodes"])
    finally:
        viewer.send_signal(2)
        assert viewer.wait(20) == 0
