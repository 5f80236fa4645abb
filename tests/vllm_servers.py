"""vLLM servers for tests: in the environment of `make vllm`, or of RAMULUS_VLLM_PYTHON; one process for each model, as long as the tests run."""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ramulus.engine.vllm.factory import MADE, PYTHON, Vllm
from ramulus.engine.vllm.process import Process
from ramulus.engine.vllm.server import Server
from ramulus.engine.vllm.vllm_engine import VllmEngine

HERE = Path(os.environ.get(PYTHON, "") or Path(__file__).parents[1] / MADE)
NEEDS = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not HERE.exists(), reason="needs the environment of `make vllm`"),
]
FACTORY = Vllm(python=str(HERE.absolute()), slots=64, memory_mb=64, threads=1, precision="float32")

_running: dict[str, Process] = {}


def temporary() -> Path:
    """A folder that goes when the tests end, after the servers."""
    folder = Path(tempfile.mkdtemp(prefix="ramulus-vllm-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def process_of(name: str, model: Any, *options: str) -> Process:
    """The process that serves a model under this name; it is started at the first call, and again where it has ended."""
    if name not in _running:
        folder = temporary()
        model.config.save_pretrained(folder / "model")
        words = [*FACTORY.words("float32", "cpu"), *options]
        _running[name] = Process(FACTORY.interpreter(), folder / "model", words, folder / "server.log", 1)
        atexit.register(_running[name].stop)
    process = _running[name]
    if process.running is None or process.running.poll() is not None:
        process.start()
        process.wait(Server(process.url, process.key, 60.0).answers)
    return process


def engine_at(
    *processes: Process, timeout: float = 120.0, reconnect: float = 60.0, ours: bool = False, in_flight: bool = False, weights: str = "files"
) -> VllmEngine:
    """An engine before servers that run; `ours`: it may end them and start them again."""
    servers = [Server(process.url, process.key, timeout, process if ours else None) for process in processes]
    for server in servers:
        server.meet(False, 3.0)
    return VllmEngine(servers, temporary(), reconnect, in_flight, weights)


@contextmanager
def loaded(name: str, model: Any, weights: Mapping[str, Any] | None = None, **options: Any) -> Iterator[VllmEngine]:
    """An engine with the model's weights as version 0."""
    engine = engine_at(process_of(name, model), **options)
    asyncio.run(engine.load(dict(weights if weights is not None else model.state_dict()), 0))
    yield engine
