"""What a recipe says of vLLM."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ramulus.engine.engine import Decode
from ramulus.engine.factory import EngineTraits
from ramulus.engine.memory import EngineMemory
from ramulus.engine.remote.client import check_url
from ramulus.engine.vllm.process import Process
from ramulus.engine.vllm.server import Server
from ramulus.engine.vllm.transfer import Relayed, refuse_way
from ramulus.engine.vllm.vllm_engine import VllmEngine

PYTHON = "RAMULUS_VLLM_PYTHON"  # of the environment: the Python that has vLLM
TRANSFERS = ("files", "gloo", "nccl", "ipc")
KEY = "RAMULUS_VLLM_KEY"  # of the environment: the VLLM_API_KEY of servers that run already
MADE = Path(".venv-vllm/bin/python")  # what `make vllm` makes


@dataclass(frozen=True)
class Vllm:
    """Samples from vLLM, in processes that the run starts and ends, or from servers that run already: docs/vllm.md.

    The key is shown in no repr and saved with no run.

    Example:
        >>> Vllm(servers=2, slots=128).urls
        ()
    """

    urls: tuple[str, ...] = ()  # of servers that run already, started by `python -m ramulus_vllm.serve`; () starts some
    servers: int = 1  # that are started
    python: str = ""  # of the environment with vLLM and ramulus-vllm; "" takes RAMULUS_VLLM_PYTHON, else .venv-vllm, which `make vllm` makes
    slots: int = 64  # sequences decoded together, in each server
    memory_mb: int = 1024  # of KV, in each server
    precision: Literal["float32", "bfloat16", "float16"] | None = None  # to sample in; None: the model's dtype
    limit: int = 0  # most tokens of prefix and continuation; 0 takes the model's
    options: tuple[str, ...] = ()  # more words for vLLM's command line: ("--tensor-parallel-size", "2")
    threads: int | None = None  # of a server on CPUs; None leaves it to vLLM
    weights: Literal["files", "gloo", "nccl", "ipc"] = "files"  # how servers get them: as safetensors in `folder`, or straight: docs/vllm.md
    in_flight: bool = False  # swap weights below requests on their way; else these end first
    folder: str = ""  # where weights are written for servers to read; "" is a temporary one. Servers on other machines need one that all see
    patience: float = 600.0  # seconds that a server may take to start
    timeout: float = 600.0  # seconds in which a server must have answered something
    reconnect: float = 60.0  # seconds for which a lost server that the run did not start is looked for
    expose: bool = False  # take servers on other machines that answer without a key
    key: str = field(default="", repr=False)  # of servers that run already; "" takes RAMULUS_VLLM_KEY of the environment

    def __post_init__(self) -> None:
        if isinstance(self.urls, str) or any(not str(url).startswith(("http://", "https://")) for url in self.urls):
            raise ValueError(f"engine.urls is a tuple of addresses such as http://127.0.0.1:8000, got {self.urls!r}")
        if self.weights not in TRANSFERS:
            raise ValueError(f"engine.weights is 'files', 'gloo', 'nccl' or 'ipc', got {self.weights!r}")
        for name in ("servers", "slots", "memory_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} must be at least 1, got {getattr(self, name)}")
        if self.limit < 0 or (self.threads is not None and self.threads < 1):
            raise ValueError(f"engine.limit must be at least 0 and engine.threads at least 1, got {self.limit} and {self.threads}")
        for url in self.urls:
            check_url(url)
        if not all(0 < seconds < math.inf for seconds in (self.timeout, self.patience)) or not 0 <= self.reconnect < math.inf:
            times = f"{self.timeout}, {self.patience} and {self.reconnect}"
            raise ValueError(f"engine.timeout and engine.patience must be above 0 and engine.reconnect at least 0 seconds, got {times}")

    @property
    def traits(self) -> EngineTraits:
        """Its servers sample, not this process; samplers of a cluster take weights by gloo or NCCL straight from the driver."""
        sender = partial(Relayed, self.weights) if self.weights in ("gloo", "nccl") else None
        sent_alone = "engine.weights='nccl'" if self.weights == "nccl" else ""
        memory = EngineMemory(self.slots, self.memory_mb, self.precision, kernels=False, at_once=True)
        servers, running = len(self.urls) or self.servers, "engine.urls" if self.urls else ""
        return EngineTraits(reads_model=False, servers=servers, running=running, sender=sender, sent_alone=sent_alone, memory=memory)

    def __call__(self, model: Any, decode: Decode | None = None) -> VllmEngine:
        """The engine, its servers started or greeted; ValueError where a server has other tokens than the model that is trained."""
        refuse_way(self.weights, device_of_model(model))
        if self.folder:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ramulus-vllm-", dir=self.folder or None))
        servers: list[Server] = []
        try:
            servers += self.met() if self.urls else self.started(model, folder)
            return self.fitting(VllmEngine(servers, folder, self.reconnect, self.in_flight, self.weights), model)
        except BaseException as error:
            for server in servers:
                if server.process is not None:
                    server.process.stop()
            if str(folder) not in str(error):  # else whoever reads it is sent to its logs
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def fitting(self, engine: VllmEngine, model: Any) -> VllmEngine:
        """The engine; closed, and ValueError, where it has other tokens than the model that is trained."""
        wanted = int(model.config.get_text_config().vocab_size)
        if wanted != engine.vocabulary:
            engine.close()
            raise ValueError(f"{engine.about} has {engine.vocabulary} tokens and the model that is trained {wanted}: serve the same model")
        return engine

    def met(self) -> list[Server]:
        """The servers at `urls`, greeted. ConnectionError where one does not answer or does not fit."""
        servers = [Server(url, self.key or os.environ.get(KEY, ""), self.timeout) for url in self.urls]
        for server in servers:
            server.meet(self.expose, min(self.reconnect, 3.0))
        return servers

    def started(self, model: Any, folder: Path) -> list[Server]:
        """Servers of our own; they start beside each other, with weights that mean nothing until the first load."""
        where = folder / "model"
        model.config.save_pretrained(where)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        options = [*self.words(dtype, device_of_model(model)), *self.options]
        logs = [folder / f"server-{i}.log" for i in range(self.servers)]
        processes = [Process(self.interpreter(), where, options, log, self.threads, self.patience) for log in logs]
        try:
            for process in processes:
                process.start()
            servers = [Server("", process.key, self.timeout, process) for process in processes]
            for server, process in zip(servers, processes, strict=True):
                process.wait(server.answers)
                server.meet(False, 3.0)
        except BaseException:
            for process in processes:
                process.stop()
            raise
        return servers

    def words(self, dtype: str, device: str) -> list[str]:
        """The command line of a server that the run starts."""
        words = ["--dtype", self.precision or dtype, "--load-format", "dummy", "--max-num-seqs", str(self.slots)]
        words += ["--kv-cache-memory-bytes", str(self.memory_mb * 2**20), *(["--enforce-eager"] if device == "cpu" else [])]
        return words + (["--max-model-len", str(self.limit)] if self.limit else [])

    def interpreter(self) -> str:
        """The Python that has vLLM. FileNotFoundError where there is none."""
        named = self.python or os.environ.get(PYTHON, "")
        usual = [MADE, Path(sys.prefix).parent / MADE]
        python = next((str(path.absolute()) for path in ([Path(named)] if named else usual) if path.exists()), None)
        if python is None:
            raise FileNotFoundError(f"there is no vLLM at {named or MADE}: run `make vllm`, or set {PYTHON} to the Python of one that has it")
        return python


def device_of_model(model: Any) -> str:
    """What a model is on: "cuda" or "cpu"; for one without numbers, what torch sees here."""
    import torch

    like = next(model.parameters())
    return str(like.device.type) if not like.is_meta else "cuda" if torch.cuda.is_available() else "cpu"
