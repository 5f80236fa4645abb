"""What sampling takes of memory, from the settings of an engine and the sizes of its model: nothing is loaded.

Every constant was read off what the engine really holds (tests/test_engine_bytes.py) or measured (`python -m benchmarks.peak`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ramulus.models.sizes import KERNELS, Sizes
from ramulus.native.processors import planned_in_bfloat16

if TYPE_CHECKING:
    import torch

USUAL_MB = 1024  # of keys and values: what `auto` takes at least, where there is room


@dataclass(frozen=True)
class PlannedSampling:
    """What a step asks of one process that samples, and what it samples with."""

    sizes: Sizes
    dtype: torch.dtype  # of the weights that are trained
    texts: int  # of a step
    longest: int  # tokens of a text
    response: int  # those of them that are sampled, at most
    cuda: bool = False  # on a GPU, or over `gpus` of them
    gpus: int = 1
    apart: bool = False  # it has a model of its own, and not the learner's
    adapted: bool = False  # the model has adapters


@dataclass(frozen=True)
class EngineMemory:
    """What an engine that decodes many sequences together, and remembers their keys and values, takes by its settings.

    Example:
        >>> from ramulus import Local
        >>> Local(slots=8).traits.memory.slots
        8
    """

    slots: int = 64  # sequences decoded together
    memory_mb: int | Literal["auto"] = USUAL_MB  # of keys and values; auto: a field `memory_mb` of its factory takes the number that is found
    precision: str | None = None  # to sample in; None: the dtype of the weights; auto: bfloat16 for float32 where it is multiplied
    kernels: bool = True  # on a CPU the compiled kernels decode what they know
    at_once: bool = False  # it takes all of memory_mb when it starts

    def dtype(self, step: PlannedSampling) -> torch.dtype:
        """What it computes in."""
        return self._dtype(step, self.by_kernels(step))

    def by_kernels(self, step: PlannedSampling) -> bool:
        """Whether the compiled kernels decode there, where there is a compiler."""
        from ramulus.engine.local.precision import unserved

        there = self.kernels and not step.cuda and step.sizes.kind in KERNELS
        return there and unserved(step.dtype, self._dtype(step, True)) is None

    def _dtype(self, step: PlannedSampling, kernels: bool) -> torch.dtype:
        from ramulus.engine.local.precision import asked_precision, sampled_in

        asked = asked_precision(self.precision, step.dtype, planned_in_bfloat16(step.cuda))
        return sampled_in(step.dtype, asked, kernels, step.adapted)

    def room(self, step: PlannedSampling) -> int:
        """Bytes that keys and values may take: those that are stated, else what all slots want."""
        return self.wanted(step) if self.memory_mb == "auto" else self.memory_mb * 2**20

    def rows(self, step: PlannedSampling, room: int) -> int:
        """Sequences of the longest kind that decode together where keys and values may take `room` bytes."""
        from ramulus.engine.local.slots import FOR_SLOTS

        return min(self.slots, max(1, int(room * FOR_SLOTS) // self._sequence(step)))

    def wanted(self, step: PlannedSampling, slots: int = 0) -> int:
        """Bytes of keys and values with which so many slots, or all of the engine, can be in use at once."""
        from ramulus.engine.local.slots import FOR_SLOTS

        wanted = int((slots or self.slots) * self._sequence(step) / FOR_SLOTS) + 1
        return wanted if slots else max(USUAL_MB * 2**20, wanted)

    def _sequence(self, step: PlannedSampling) -> int:
        """Bytes of the keys and values of a sequence of the longest kind."""
        from ramulus.engine.local.kv import rounded

        return rounded(step.longest) * step.sizes.token_bytes(self.dtype(step).itemsize)

    def parts(self, step: PlannedSampling, room: int) -> dict[str, float]:
        """Bytes by name of what sampling takes where keys and values may take `room` bytes."""
        from ramulus.engine.local.precision import copied_bytes
        from ramulus.engine.local.prefill import PIECE

        sizes, own, precision = step.sizes, step.dtype.itemsize, self.dtype(step)
        compiled, rows, sequence = self.by_kernels(step), self.rows(step, room), self._sequence(step)
        if compiled:
            copy = copied_bytes(step.dtype, precision, sizes.matrices, sizes.vocabulary * sizes.hidden)
        else:
            copy = sizes.parameters * precision.itemsize if precision != step.dtype else 0
        model = sizes.parameters * own if step.apart and (compiled or not copy) else 0
        held = min(room, step.texts * sequence + (0 if compiled else (rows + 8) * sequence))
        logits = rows * sizes.vocabulary * 4 * (2 if compiled else 6)
        passes = PIECE * (0.5 * sizes.hidden if compiled else sizes.hidden * 4 + sizes.inner * 3) * 4
        samples = 0 if step.cuda else rows * 2 * step.response * 40
        return {
            "the sampler's model": model / step.gpus,
            "the kernels' copy of the weights" if compiled else "the sampler's copy of the weights": copy / step.gpus,
            "keys and values": (room if self.at_once else held) / step.gpus,
            "decoding": logits / step.gpus + passes + samples,
        }
