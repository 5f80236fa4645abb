"""What a recipe says of the local engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ramulus.engine.engine import Decode

if TYPE_CHECKING:
    from ramulus.engine.local.local_engine import LocalEngine


@dataclass(frozen=True)
class Local:
    """The local engine: samples with the learner's own weights, on CPU or one GPU.

    Example:
        >>> Local(slots=256).memory_mb
        1024
    """

    slots: int = 64  # sequences decoded together
    memory_mb: int = 1024  # of kept KV; the oldest is dropped beyond it and prefilled again
    precision: Literal["float32", "bfloat16"] | None = None  # to sample in; None: the model's dtype
    threads: int | None = (
        None  # of torch while it decodes; None leaves all. Without a C compiler models of some hundred dimensions are faster with 1
    )

    def __post_init__(self) -> None:
        if self.slots < 1 or self.memory_mb < 1:
            raise ValueError(
                f"engine.slots and engine.memory_mb must be at least 1, got {self.slots} and {self.memory_mb}"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"engine.threads must be at least 1, got {self.threads}: leave it out for all")

    def __call__(self, model: Any, decode: Decode | None = None) -> LocalEngine:
        """The engine that reads the parameters of `model`; `decode` is the text of tokens."""
        import torch

        from ramulus.engine.local.local_engine import LocalEngine

        precision = getattr(torch, self.precision) if self.precision else None
        return LocalEngine(model, self.slots, self.memory_mb * 2**20, precision, threads=self.threads, decode=decode)
