"""Two machines of one: network namespaces joined by a cable, each with a host name, a private folder and a raylet of its own. Wants root and `ip`."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

NET = "10.77.0"
PORT = 6379
RAY = str(Path(sys.executable).with_name("ray"))
QUIET = ["--object-store-memory=100000000", "--disable-usage-stats"]


@dataclass
class Nodes:
    """Namespaces, by their names, and a folder that each of them sees as its own."""

    names: tuple[str, str]
    devices: tuple[str, str]  # each one's end of the cable
    private: Path
    environment: dict[str, str]

    def inside(self, node: int, *command: str) -> list[str]:
        """The command, on a node."""
        return ["ip", "netns", "exec", self.names[node], *command]

    def run(self, node: int, *command: str, seconds: float = 400) -> subprocess.CompletedProcess[str]:
        """What a command on a node says, with the streams in one."""
        words = self.inside(node, *command)
        return subprocess.run(words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)

    def ramulus(self, *words: str, seconds: float = 400) -> tuple[int, str]:
        """Status and words of a command of ramulus on the first node."""
        done = self.run(0, sys.executable, "-m", "ramulus", *words, seconds=seconds)
        return done.returncode, done.stdout


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def cabled() -> Iterator[Nodes]:
    """The two namespaces, without Ray."""
    mark = secrets.token_hex(3)
    names = (f"rml-{mark}-1", f"rml-{mark}-2")
    ends = (f"rml{mark}a", f"rml{mark}b")
    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces are not permitted here")
    folder = Path(tempfile.mkdtemp(prefix="rml", dir="/tmp"))  # short: sockets lie below it
    (folder / "private").mkdir()
    try:
        ip("netns", "add", names[1])
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for i in (0, 1):
            ip("-n", names[i], "addr", "add", f"{NET}.{i + 1}/24", "dev", ends[i])
            for device in ("lo", ends[i]):
                ip("-n", names[i], "link", "set", device, "up")
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
        own |= {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
        yield Nodes(names, ends, folder / "private", {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | own)
    finally:
        for name in names:
            said = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for process in said.split():
                os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def clustered(cpus: Sequence[int]) -> Iterator[Nodes]:
    """The same, a cluster of Ray."""
    with cabled() as nodes:
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={nodes.private.parent / 'ray'}"]
        for i, words in enumerate((head, [f"--address={NET}.1:{PORT}"])):
            start = [RAY, "start", *words, f"--node-ip-address={NET}.{i + 1}", f"--num-cpus={cpus[i]}", *QUIET, "--block"]
            prepared = f'hostname node{i + 1}; mount -t tmpfs none {nodes.private}; exec "$@"'
            log = (nodes.private.parent / f"node{i + 1}.log").open("w")
            command = nodes.inside(i, "unshare", "-m", "-u", "sh", "-c", prepared, "sh", *start)
            subprocess.Popen(command, env=nodes.environment, stdout=log, stderr=subprocess.STDOUT)
            wait_for(nodes, i + 1)
        yield nodes


def wait_for(nodes: Nodes, count: int, seconds: float = 120) -> None:
    """Until so many machines are in the cluster."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        said = nodes.run(0, RAY, "status", "--address", f"{NET}.1:{PORT}").stdout
        if said.count(" 1 node_") >= count:
            return
        time.sleep(1)
    raise TimeoutError(f"no {count} machines in {seconds:g} seconds: {said[-500:]}")
