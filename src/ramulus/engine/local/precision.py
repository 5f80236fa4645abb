"""In which numbers an engine computes and what its copy of the weights takes: asked by its choice of a forward, by `ramulus plan` and by `auto`."""

from __future__ import annotations

import torch

from ramulus.models.precision import HALVES


def asked_precision(named: str | None, own: torch.dtype, multiplied: bool) -> torch.dtype | None:
    """The dtype that `engine.precision` names, None for the model's `own`; auto is bfloat16 for float32 where the device has it `multiplied`."""
    if named == "auto":
        return torch.bfloat16 if multiplied and own == torch.float32 else None
    dtype: torch.dtype | None = getattr(torch, named) if named else None
    return dtype


def sampled_in(own: torch.dtype, asked: torch.dtype | None, kernels: bool, adapted: bool) -> torch.dtype:
    """The dtype of keys and values and of the weights that are read, for a model in `own` of which `asked` is wanted (None: its own).

    The kernels know float32 and bfloat16. Adapters on weights in half precision are merged in float32: rounded, most of what they add would be lost.
    """
    if not kernels:
        return asked or own
    return torch.bfloat16 if (asked or own) == torch.bfloat16 and not (adapted and own in HALVES) else torch.float32


def unserved(own: torch.dtype, precision: torch.dtype) -> str | None:
    """Why the kernels do not compute a model in `own` in this precision; None where they do."""
    if own == torch.float64:
        return "the kernels compute in float32 or bfloat16, the model in float64"
    if own == torch.float16 and precision == torch.bfloat16:
        return (
            "the kernels do not round a float16 model to bfloat16, which has 3 bits less of each number: leave engine.precision out, "
            "which samples it in float32, or set model.dtype=bfloat16"
        )
    return None


def copied_bytes(own: torch.dtype, precision: torch.dtype, matrices: int, table: int) -> int:
    """Bytes of the kernels' copy of a model: numbers of all its matrices, its head too, and of its embeddings, which are read in place in `precision`
    or in float32 and copied to float32 else."""
    return matrices * precision.itemsize + (0 if own in (precision, torch.float32) else 4 * table)
