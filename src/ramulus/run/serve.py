"""`ramulus serve`: a model behind an engine server, for runs that sample in another process."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from ramulus.engine.remote.factory import TOKEN, token_of
from ramulus.engine.remote.listen import bind, is_loopback, listener
from ramulus.engine.remote.server import Served
from ramulus.engine.weight_bytes import state_of_bytes, table_of_bytes
from ramulus.look.terminal import new_console

TOY = 8  # tokens of the toy model


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what opens it. ValueError for one that others could reach without meaning it."""

    host: str
    port: int
    token: str = field(repr=False)  # "" takes RAMULUS_TOKEN from the environment, else draws one
    expose: bool

    def __post_init__(self) -> None:
        if not is_loopback(self.host):
            if not self.expose:
                raise ValueError(f"--host {self.host} can be reached from other machines: add --expose if that is meant, or leave --host out")
            if not self.given:
                raise ValueError(f"--host {self.host} needs a token that you choose: set {TOKEN}, to a long random text")

    @property
    def given(self) -> str:
        """The token that was chosen, or ""."""
        return token_of(self.token)


def serve(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    host: str = "127.0.0.1",
    port: int = 0,
    token: str = "",
    expose: bool = False,
    slots: int = 64,
    memory_mb: int = 1024,
    device: str = "auto",
    threads: int | None = None,
) -> int:
    """Serve a model to runs in other processes, which sample with engine=Remote(url=...); docs/remote.md says how.

    Args:
        model: a Hugging Face model folder or name, the folder of a run (its last checkpoint), or toy.
        host: the address to listen at; any but this machine's own also needs --expose and a token.
        port: by default a free one.
        token: what every call must know; by default RAMULUS_TOKEN of the environment, which others cannot see, or a new one, which is printed.
        expose: let other machines reach it.
        slots: rows decoded together.
        memory_mb: of KV.
        device: cpu, cuda, cuda:1, or auto.
        threads: of torch; all cores by default.
    """
    address, console = Address(host, port, token, expose), new_console()
    secret = address.given or secrets.token_urlsafe(32)

    def ready(url: str) -> None:
        say(console, f"{served.model} at {url} (Ctrl-C ends it)")
        if not address.given:
            say(console, f"{TOKEN}={secret}")
        if not is_loopback(host):
            say(console, "what is sent is not encrypted: let only machines that you trust reach this port")

    with bind(host, port) as bound, suppress(KeyboardInterrupt):  # how it ends
        served = toy(model, secret) if model.partition(":")[0] == "toy" else local(model, secret, slots, memory_mb, device, threads)
        listener(lambda: served, host, bound, ready, "serve", timeout_keep_alive=120).run(sockets=[bound])
    return 0


def say(console: Console, text: str) -> None:
    """One line, as it is."""
    console.out(text, highlight=False)


def _rules() -> dict[str, type]:
    """The temperature rules that a server builds from what a client says."""
    from ramulus.grow.temperature import ByEntropy

    return {kind.__name__: kind for kind in (ByEntropy,)}


def toy(model: str, token: str) -> Served:
    """The toy engine: `toy`, or `toy:VOCABULARY`."""
    import torch

    from ramulus.engine.toy import ToyEngine

    size = model.partition(":")[2]
    if size and not size.isdecimal():
        raise ValueError(f"{model!r}: write toy, or toy:64 for a vocabulary of 64 tokens")
    vocabulary = int(size or TOY)
    return Served(ToyEngine(vocabulary, as_array=torch.tensor), token, model, vocabulary, _rules(), table_of_bytes)


def local(model: str, token: str, slots: int, memory_mb: int, device: str, threads: int | None) -> Served:
    """A model folder, a name on the hub or a run's last checkpoint, in the local engine."""
    from ramulus.run.evaluation.loaded_model import load_model

    loaded = load_model(model, device, threads, slots, memory_mb)
    vocabulary = int(loaded.model.get_input_embeddings().num_embeddings)
    return Served(loaded.engine, token, model, vocabulary, _rules(), state_of_bytes)
