"""Tokens a second of a GPU, from its data sheet and the share of it that was measured to be reached; how far that is from what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ramulus.models.sizes import Sizes


@dataclass(frozen=True)
class Gpu:
    """One processor: bytes of memory, multiplications and additions of dense bfloat16 a second, bytes read a second, as its maker states them.

    Shares of that which are reached: of its products by the update and by decoding, of its bandwidth by decoding.
    """

    memory: float
    speed: float
    bandwidth: float
    update: float
    decode: float = 0.30  # taken as about the update's
    reading: float = 0.75  # 0.77 by the first who decodes in `published`


GPUS = {  # NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM 80 GB, L40S, GeForce RTX 4090; shares by `published`, of the others like the H100's
    "H100": Gpu(80e9, 989e12, 3.35e12, 0.32),
    "H200": Gpu(141e9, 989e12, 4.8e12, 0.32),
    "A100": Gpu(80e9, 312e12, 2.04e12, 0.49),
    "L40S": Gpu(48e9, 362e12, 0.864e12, 0.32),
    "4090": Gpu(24e9, 165e12, 1.008e12, 0.32),
}
A100_40 = Gpu(40e9, 312e12, 1.555e12, 0.49)


def decode_rate(gpu: Gpu, sizes: Sizes, rows: int, context: float, itemsize: int, group: int = 1) -> float:
    """Tokens a second of `group` GPUs that decode so many rows with `context` tokens before each: a step reads weights, keys and values."""
    reads = (sizes.active * itemsize + rows * context * sizes.token_bytes(itemsize)) / (group * gpu.bandwidth * gpu.reading)
    products = 2 * sizes.active * rows / (group * gpu.speed * gpu.decode)
    return rows / max(reads, products)


def update_rate(gpu: Gpu, sizes: Sizes, checkpointing: bool, context: float = 0.0, scoring: int = 0) -> float:
    """Tokens a second that one GPU learns from, which see `context` tokens on average.

    A token is three passes through the model, a fourth where layers are computed again, and `scoring` more that keep nothing.
    """
    products = 2 * sizes.active + 4 * sizes.layers * sizes.query * context
    return gpu.speed * gpu.update / ((3 + checkpointing + scoring) * products)


class Published(NamedTuple):
    """Something that somebody measured, and what is computed of it here, in tokens a second of one GPU."""

    what: str
    measured: float
    computed: float
    source: str

    @property
    def error(self) -> float:
        """The relative error of what is computed: 0.1 where it is 10 % above what was measured."""
        return self.computed / self.measured - 1


def llama(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> Sizes:
    """The sizes of a model of that family with heads of 128 numbers and an output layer of its own; its linear layers are left out."""
    key = 128 * key_heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * key + 3 * hidden * inner + 2 * hidden) + vocabulary * hidden + hidden
    return Sizes("llama", layers, hidden, heads, 128, key, inner, vocabulary, weights + vocabulary * hidden, weights, (), 2**31)


def published() -> list[Published]:
    """The table that the shares above are from, with the error of each."""
    small, seven = llama(4096, 14336, 32, 32, 8, 128256), llama(4096, 11008, 32, 32, 32, 32000)
    large = llama(8192, 28672, 80, 64, 8, 128256)
    h100, a100 = GPUS["H100"], GPUS["A100"]
    titan, sweep = "torchtitan, docs/performance.md", "vLLM 0.23, johnmusgrave.com/p/vllm-throughput-latency-sweep-on"
    return [
        Published("update, Llama 3.1 8B, 8 H100, FSDP2", 5762, update_rate(h100, small, False, 4096), titan),
        Published("the same, compiled", 6667, update_rate(h100, small, False, 4096), titan),
        Published("update, Llama 3 8B, 64 A100, FSDP2, compiled", 2973, update_rate(a100, small, False, 4096), titan),
        Published("update, Llama 3 70B, 64 A100, layers computed again", 331, update_rate(a100, large, True, 4096), titan),
        Published("update, Llama 2 7B, 128 A100, FSDP", 3700, update_rate(a100, seven, False, 2048), "pytorch.org/blog/maximizing-training"),
        Published("decoding, Llama 3.1 8B, A100 40 GB, 1 row", 75, decode_rate(A100_40, small, 1, 1088, 2), sweep),
        Published("decoding, the same, 8 rows", 495, decode_rate(A100_40, small, 8, 1088, 2), sweep),
    ]
