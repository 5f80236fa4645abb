"""What a recipe says of the local engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ramulus.engine.engine import Decode
from ramulus.engine.factory import EngineTraits
from ramulus.engine.memory import EngineMemory
from ramulus.models.sizes import KERNELS, sizes_of_model
from ramulus.native.memory import free_on
from ramulus.native.processors import device_multiplies_bfloat16

if TYPE_CHECKING:
    from ramulus.engine.local.local_engine import LocalEngine

MIB = 2**20
_LONG = 2048  # tokens of a text, where nobody says how long they may become


@dataclass(frozen=True)
class Local:
    """The local engine: samples with the learner's own weights, on CPU or one GPU.

    `memory_mb`: auto takes what all slots need for the longest texts, at least 1024 and no more than fits; a run keeps the number that it took.

    Example:
        >>> Local(slots=256).memory_mb
        'auto'
    """

    slots: int = 64  # sequences decoded together
    memory_mb: int | Literal["auto"] = "auto"  # of kept KV; the oldest is dropped beyond it and prefilled again
    precision: Literal["auto", "float32", "bfloat16"] | None = None  # None: the model's; auto: bfloat16 for float32 where it is multiplied
    threads: int | None = (
        None  # of torch while it decodes; None leaves all. Without a C compiler models of some hundred dimensions are faster with 1
    )

    def __post_init__(self) -> None:
        if self.slots < 1 or (self.memory_mb != "auto" and self.memory_mb < 1):
            raise ValueError(
                f"engine.slots and engine.memory_mb must be at least 1, got {self.slots} and {self.memory_mb}"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"engine.threads must be at least 1, got {self.threads}: leave it out for all")

    @property
    def traits(self) -> EngineTraits:
        """It samples in this process, and takes memory by these settings."""
        return EngineTraits(memory=EngineMemory(self.slots, self.memory_mb, self.precision))

    def __call__(self, model: Any, decode: Decode | None = None) -> LocalEngine:
        """The engine that reads the parameters of `model`; `decode` is the text of tokens."""
        from ramulus.engine.local.local_engine import LocalEngine
        from ramulus.engine.local.precision import asked_precision

        some = next(model.parameters())
        precision = asked_precision(self.precision, some.dtype, device_multiplies_bfloat16(some.device))
        size = usual_memory(model, self.slots, precision) if self.memory_mb == "auto" else self.memory_mb * MIB
        return LocalEngine(model, self.slots, size, precision, threads=self.threads, decode=decode)


def usual_memory(model: Any, slots: int, precision: Any = None) -> int:
    """Bytes of KV for as many texts of _LONG tokens, or of the model's longest; at least 1 GiB, else no more than a third of what is free."""
    try:
        sizes = sizes_of_model(model)
    except ValueError:  # its KV is asked of the model itself, when the engine is made
        return 2**30
    from ramulus.engine.local.precision import sampled_in

    some, adapted = next(model.parameters()), any(".lora_" in name for name, _ in model.named_parameters())
    computed = sampled_in(some.dtype, precision, some.device.type == "cpu" and sizes.kind in KERNELS, adapted)
    wanted = slots * min(_LONG, sizes.positions) * sizes.token_bytes(computed.itemsize) * 4 // 3
    return max(2**30, min(wanted, free_on(some.device) // 3))
