"""What a recipe says of an engine in another process."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from ramulus.engine.engine import Decode
from ramulus.engine.factory import EngineTraits
from ramulus.engine.remote.client import RemoteEngine, check_url

TOKEN = "RAMULUS_TOKEN"  # of the environment


def token_of(token: str) -> str:
    """A token that was given, else that of the environment; "" without either."""
    return token or os.environ.get(TOKEN, "")


@dataclass(frozen=True)
class Remote:
    """Samples from an engine that another process serves: start it with `ramulus serve MODEL`.

    The token is shown in no repr and saved with no run.

    Example:
        >>> Remote("http://127.0.0.1:8123/", token="secret")
        Remote(url='http://127.0.0.1:8123/', timeout=600.0, reconnect=60.0)
    """

    url: str  # as `ramulus serve` prints it
    token: str = field(default="", repr=False)  # "" takes RAMULUS_TOKEN of the environment
    timeout: float = 600.0  # seconds that a call may take
    reconnect: float = 60.0  # seconds for which a lost server is asked again

    def __post_init__(self) -> None:
        check_url(self.url)
        if not 0 < self.timeout < math.inf or not 0 <= self.reconnect < math.inf:
            raise ValueError(f"engine.timeout must be above 0 and engine.reconnect at least 0 seconds, got {self.timeout} and {self.reconnect}")

    @property
    def traits(self) -> EngineTraits:
        """Its server samples, not this process."""
        return EngineTraits(reads_model=False, servers=1, running="engine.url")

    def __call__(self, model: Any = None, decode: Decode | None = None) -> RemoteEngine:
        """The engine; ValueError where it has other tokens than the model that is trained. `decode` is not needed: servers read their own text."""
        engine = RemoteEngine(self.url, token_of(self.token), self.timeout, self.reconnect)
        wanted = engine.vocabulary if model is None else int(model.get_input_embeddings().num_embeddings)
        if wanted != engine.vocabulary:
            raise ValueError(
                f"the engine server at {self.url} has {engine.vocabulary} tokens and the model that is trained {wanted}: serve the same model"
            )
        return engine
