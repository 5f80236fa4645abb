"""What the last bits of a run depend on beside its settings: recorded in every checkpoint, and said where it is another one at a resume."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from ramulus.native.build import why
from ramulus.run.doctor import version_of

PACKAGES = ("ramulus", "torch", "transformers", "numpy")
VARIABLES = (  # of the environment, by which libraries choose their kernels
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "RAMULUS_NATIVE",
)  # fmt: skip


def numerics(device: torch.device, engine: str) -> dict[str, str]:
    """Packages, processor, kernels, threads and precision of this process, and how its engine says that it decodes."""
    facts = {name: version_of(name) or "not installed" for name in PACKAGES}  # ramulus may run from its sources
    facts |= {"processor": _processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "kernels": why()}
    facts |= {"threads": str(torch.get_num_threads()), "engine": engine}
    facts |= {"float32 products": torch.get_float32_matmul_precision()}
    facts |= {"deterministic": str(torch.are_deterministic_algorithms_enabled())}
    if device.type == "cuda":
        facts |= {"GPU": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
        facts |= {"TF32 in cuDNN": str(torch.backends.cudnn.allow_tf32)}
    return facts | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def other_numerics(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is different, in words; "" where nothing is."""
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name, 'not set')}, is now {now.get(name, 'not set')}" for name in names)


def _processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
