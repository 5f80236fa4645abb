"""What a checkpoint keeps, for tests to compare."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ramulus.run.checkpoint import path_of


def tensors(folder: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return load_file(path_of(folder, step) / "tensors.safetensors")
