"""What is installed, on which device, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from ramulus.native.processors import cores
from ramulus.tasks import sandbox
from ramulus.tasks.workers import WorkerPool

NEEDED = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "tyro", "rich", "jinja2", "pyyaml")
EXTRAS = {  # extra -> (module, distribution, what it is for)
    "math": ("math_verify", "math-verify", "grading of boxed mathematics"),
    "gym": ("reasoning_gym", "reasoning-gym", "reasoning-gym tasks"),
    "data": ("datasets", "datasets", "Hugging Face datasets, parquet"),
    "lora": ("peft", "peft", "LoRA"),
    "tensorboard": ("tensorboard", "tensorboard", "TensorBoard"),
    "fast": ("orjson", "orjson", "files of trees, written several times as fast"),
    "viewer": ("starlette", "starlette", "ramulus view"),
    "serve": ("uvicorn", "uvicorn", "ramulus serve"),
    "ray": ("ray", "ray", "cluster=Ray(...)"),
    "remote": ("httpx2", "httpx2", "engine=Remote(...)"),
    "plots": ("matplotlib", "matplotlib", "plots of ramulus compare"),
    "gpu": ("pynvml", "nvidia-ml-py", "the busy share of a GPU"),
    "wandb": ("wandb", "wandb", "Weights & Biases"),
    "trackio": ("trackio", "trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow-skinny", "MLflow"),
}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> list[tuple[str, str, str]]:
    """(name, version or "missing", what to do) of what is needed and what is optional."""
    rows = [("ramulus", version_of("ramulus") or "not installed, run from its sources", "")]
    for name in NEEDED:
        installed = version_of(name)
        rows.append((name, installed or "missing", "" if installed else "pip install ramulus"))
    for extra, (module, distribution, purpose) in EXTRAS.items():
        installed = version_of(distribution) if importlib.util.find_spec(module) else None
        rows.append(
            (
                distribution,
                installed or "not installed",
                purpose if installed else f'for {purpose}: pip install "ramulus[{extra}]"',
            )
        )
    return rows


def _graders() -> str:
    """What holds a grading process, as one that is started says."""
    pool = WorkerPool(1, gigabytes=4.0)
    try:
        outcome = pool.submit(sandbox.state, seconds=5).result()
    finally:
        pool.close()
    return f"cannot start: {outcome.failure}" if outcome.failure else sandbox.in_words(outcome.value)


def machine() -> list[tuple[str, str]]:
    """The machine as torch sees it; imports torch."""
    rows = [("python", platform.python_version()), ("system", platform.platform()), ("cores", str(cores()))]
    if importlib.util.find_spec("torch"):
        import torch

        from ramulus.native.blocks import blocks_refused
        from ramulus.native.build import multiplying, why
        from ramulus.native.memory import free_memory, large_pages

        free = free_memory() / 1e9
        rows.append(("torch threads", str(torch.get_num_threads())))
        rows.append(("kernels for CPUs", why() + multiplying()))
        rows.append(("free memory", f"{free:.1f} GB: less engine.memory_mb, the kernels' copy of the weights must fit into it"))
        rows.append(("large pages", large_pages()))
        rows.append(("blocks that tensors leave", blocks_refused() or "kept for the next ones while a model of 64 MB or more is trained on the CPU"))
        if torch.cuda.is_available():
            for i in range(torch.cuda.device_count()):
                card = torch.cuda.get_device_properties(i)
                rows.append((f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB"))
        else:
            built = (
                f"torch is built for CUDA {torch.version.cuda} but sees no device"
                if torch.version.cuda
                else "none; this torch is a CPU build"
            )
            rows.append(("cuda", built))
    rows.append(("graders", _graders()))
    policy = os.environ.get("OMP_WAIT_POLICY", "not set: busy waiting can slow shared cores down tenfold, use PASSIVE")
    rows.append(("OMP_WAIT_POLICY", policy))
    rows.append(("free disk here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB"))
    return rows
