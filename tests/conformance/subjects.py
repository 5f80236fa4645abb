"""Engines that the conformance suite runs over; another one joins by an entry of ENGINES."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from placed import placed
from ramulus.engine.engine import Engine, Request, Segment
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.engine.toy import ToyEngine
from ramulus.learn.policy.model import Scratch
from ramulus.run.gated_engine import GatedEngine
from served import served
from vllm_servers import loaded

ALPHABET = "0123456789+-=?\n"
Plain = Callable[[Sequence[int]], torch.Tensor]
"""Tokens [N] -> logits of the next one [V], by the model's own forward pass, in float64."""


@dataclass
class Subject:
    """An engine under test, and what is known of its model without asking it."""

    engine: Engine
    vocabulary: int
    plain: Plain
    other: Mapping[str, Any]  # weights of another model
    plain_of_other: Plain

    def sample(self, requests: Sequence[Request]) -> list[Segment]:
        return asyncio.run(self.engine.sample(requests))


def scratch(seed: int, hidden: int = 32) -> tuple[Any, Any]:
    """A random model and its tokenizer; the weights are large enough that attention and position matter."""
    return Scratch(ALPHABET, hidden=hidden, layers=2, heads=2, kv_heads=1, init_std=0.3, seed=seed)()


def forward_of(model: Any) -> Plain:
    """The model's own forward pass over the whole text."""

    @torch.no_grad()
    def plain(tokens: Sequence[int]) -> torch.Tensor:
        return model(torch.tensor([list(tokens)])).logits[0, -1].double()

    return plain


def table_of(engine: ToyEngine) -> Plain:
    return lambda tokens: torch.tensor(engine.logits(tokens), dtype=torch.float64)


def of_models(engine: Engine, hidden: int = 32) -> Subject:
    """A subject whose engine samples from `scratch(0)`."""
    (model, _), (other, _) = scratch(0, hidden), scratch(1, hidden)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    return Subject(engine, vocabulary, forward_of(model), dict(other.state_dict()), forward_of(other))


def of_tables(engine: Engine) -> Subject:
    """A subject whose engine is a toy, here or elsewhere."""
    table = {(): [1.0, 0.0, 2.0, 0.5, 0.0, 1.5, 0.0, 0.2]}
    return Subject(engine, 8, table_of(ToyEngine()), table, table_of(ToyEngine(table=table)))  # type: ignore[arg-type]


@contextmanager
def toy(folder: Path) -> Iterator[Subject]:
    yield of_tables(ToyEngine(as_array=torch.tensor))


def local(**options: Any) -> Callable[[Path], Any]:
    @contextmanager
    def build(folder: Path) -> Iterator[Subject]:
        yield of_models(LocalEngine(scratch(0)[0], slots=8, threads=1, **options))

    return build


@contextmanager
def of_samplers(folder: Path) -> Iterator[Subject]:
    yield of_models(placed(scratch(0)[0])[0])


@contextmanager
def gated(folder: Path) -> Iterator[Subject]:
    yield of_models(GatedEngine(LocalEngine(scratch(0)[0], slots=8, threads=1)))


@contextmanager
def remote_toy(folder: Path) -> Iterator[Subject]:
    with served("toy") as server:
        yield of_tables(server.engine())


@contextmanager
def remote_local(folder: Path) -> Iterator[Subject]:
    model, tokenizer = scratch(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with served(str(folder), "--slots", "8") as server:
        yield of_models(server.engine())


@contextmanager
def vllm(folder: Path) -> Iterator[Subject]:
    with loaded("conformance", scratch(0, 64)[0]) as engine:  # heads of 32, the least that its attention on a CPU has
        yield of_models(engine, 64)


ENGINES: dict[str, Callable[[Path], Any]] = {
    "toy": toy,
    "compiled": local(),
    "fused": local(native=False),
    "transformers": local(fast=False),
    "gated": gated,
    "placed": of_samplers,
    "remote toy": remote_toy,
    "remote local": remote_local,
    "vllm": vllm,
}
