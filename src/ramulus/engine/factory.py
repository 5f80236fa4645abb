"""What a recipe's `engine` is: a factory of engines, and what it says of one before it is built."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ramulus.engine.engine import Decode, Engine
from ramulus.engine.memory import EngineMemory
from ramulus.engine.pushed import Held

EngineFactory = Callable[[Any, Decode], Engine]
"""A frozen dataclass that builds the engine, given the learner's model in this process and what tells the text of tokens.

What it builds is the plainest kind, unless it has an attribute or property `traits`: an EngineTraits.
"""

Relay = Callable[..., Awaitable[Any]]
"""Asks the engine of a sampler in another process by its `relay`."""


class WeightSender(Protocol):
    """A driver's end of the way by which weights go from where they are straight into the engine of a sampler."""

    def hold(self, weights: Mapping[str, Any], version: int) -> Held:
        """The weights as they are sent."""
        ...

    async def send(self, new: Held, in_flight: bool) -> Any:
        """The engine's word once it has them, which its `took` is then given. Raises a Fault."""
        ...

    def close(self) -> None:
        """Leave the way."""
        ...


SenderFactory = Callable[[Relay, str, float], WeightSender]
"""Builds a sender, given a relay, this machine's address as samplers reach it, and seconds that an answer may take."""


class SentEngine(Engine, Protocol):
    """An engine whose factory has a `sender`."""

    async def relay(self, *question: Any) -> Any:
        """Answers what the sender asks of it, in another process."""
        ...

    def took(self, word: Any, name: str, version: int) -> None:
        """The weights that it was sent are those that are meant from now on."""
        ...


@dataclass(frozen=True)
class EngineTraits:
    """What a factory says of its engine before it is built; as they stand here, of one that samples in this process with the model that it is given.

    Example:
        >>> from ramulus import Vllm
        >>> Vllm(servers=2).traits.servers
        2
    """

    reads_model: bool = True  # its parameters; False: its configuration alone, so that a sampler need not hold any
    servers: int = 0  # other processes that sample for it, each with a model of its own
    running: str = ""  # the setting that names these where they run already, "engine.url"; else it starts them
    sender: SenderFactory | None = None  # of weights, straight into the engine of a sampler on a cluster
    sent_alone: str = ""  # the setting by which it takes weights of a sender alone, and none that a sampler has
    memory: EngineMemory = field(default_factory=EngineMemory)  # of what it samples with, in this process or another


def engine_traits(factory: EngineFactory) -> EngineTraits:
    """What a factory says of its engine."""
    traits: EngineTraits = getattr(factory, "traits", EngineTraits())
    return traits
