"""What the benchmarks share: models of known shapes, interleaved timing, and a record of machine and figures."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "trl")


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model with random weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    def __call__(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, positions: int = 32768
    ) -> Any:
        """The model in eval mode, the same one for the same arguments."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, max_position_embeddings=positions,
            tie_word_embeddings=self.tied, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen2ForCausalLM(config)
        return model.to(device=device, dtype=dtype).eval()


SHAPES = {
    "quickstart": Shape(128, 2, 4, 2, 512, 20),  # that of `make quickstart`: 0.5 M parameters
    "S": Shape(256, 4, 8, 4, 1024, 512),  # 4.2 M
    "M": Shape(512, 12, 8, 4, 2048, 512),  # 48 M
    "0.5B": Shape(896, 24, 14, 2, 4864, 151_936, tied=True),  # Qwen2.5-0.5B
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151_936, tied=True),  # Qwen2.5-1.5B
}


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: list[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def settle(device: str) -> None:
    """Wait until the device has done all it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender, one after the other in every repeat, so that a drift of the machine reaches all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(warmup + repeats):
        for name, work in contenders.items():
            settle(device)
            start = clock()
            work()
            settle(device)
            if repeat >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], mine: str, rival: str) -> Spread:
    """How many times faster `mine` is: the spread of the quotients within each repeat."""
    return spread([theirs / ours for ours, theirs in zip(seconds[mine], seconds[rival], strict=True)])


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on: processor or GPU, threads, versions."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        name = _processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }


def _processor() -> str:
    """The processor's own name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the packages whose speed is measured, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def record(benchmark: str, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """Print the line of JSON for the record."""
    print(json.dumps({"benchmark": benchmark, "machine": machine(device), "rows": rows}))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of like keys as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows])
