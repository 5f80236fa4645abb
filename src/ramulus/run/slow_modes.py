"""What makes a run slower than this machine could be: said once, before its first step, with the remedy."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ramulus.core import run_folder
from ramulus.engine.factory import engine_traits
from ramulus.learn.factory import learner_traits
from ramulus.native.build import why
from ramulus.native.processors import allowed, busy_cores, cores, device_multiplies_bfloat16, multiplies_bfloat16
from ramulus.run.config.recipe import Run


def threads_of(run: Run) -> int:
    """Threads for a run: its own, those of its newest checkpoint (the last bits depend on them), else the usual ones."""
    return run.threads or recorded_threads(run.folder) or usual_threads()


def recorded_threads(folder: Path) -> int | None:
    """Threads of the newest checkpoint of a run, where it says them and the machine has as many cores."""
    before = run_folder.stage_folders(folder.parent) if (folder.parent / "run.json").is_file() else []
    for stage in (folder, *reversed(before)):  # a run of several stages keeps them from stage to stage
        with suppress(OSError, ValueError, KeyError, TypeError):
            count = int((run_folder.newest_state(stage) or {})["numerics"]["threads"])
            return count if 1 <= count <= cores() else None
    return None


@cache
def usual_threads() -> int:
    """OMP_NUM_THREADS where it is set; else the cores that others leave free, at least one.

    A limit of time may be below the number of processors: then others keep none from it until they are busy on more than are left over.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads.isdigit() and int(threads) > 0:
        return int(threads)
    if (most := cores()) == 1:
        return 1
    left_over = max(0, len(allowed()) - most)
    return max(1, most - max(0, round(busy_cores()) - left_over))


def slow_modes(run: Run, device: torch.device) -> list[str]:
    """A sentence for each mode of this run that makes it slower than it could be here; on a GPU what `autocast=auto` takes alone."""
    if device.type != "cpu":
        return taken_by_auto(run, device)
    sentences, threads, most = [], torch.get_num_threads(), cores()
    if (kernels := why()).startswith("none: "):
        sentences.append(f"slow: torch's operations in place of compiled kernels, as {kernels.removeprefix('none: ')}")
    if threads < most and run.threads is None:
        reason = "as OMP_NUM_THREADS says" if os.environ.get("OMP_NUM_THREADS") else "as others keep this machine busy, or its checkpoints began so"
        sentences.append(f"{threads} of {most} threads, {reason}; threads={most} takes all")
    elif threads == 1 < most:
        sentences.append(f"1 thread of {most}, as threads=1 says")
    sentences += taken_by_auto(run, device)
    if (asked := asked_in_bfloat16(run)) and not multiplies_bfloat16():
        words, faster = " and ".join(asked), " and ".join(asked.values())
        sentences.append(f"slow: {words} on a processor that does not multiply bfloat16; {faster} {'are' if len(asked) > 1 else 'is'} faster here")
    return sentences


def taken_by_auto(run: Run, device: torch.device) -> list[str]:
    """What `autocast=auto` takes on the learner's device, where that is float32."""
    half = getattr(run.model, "dtype", "float32") in ("bfloat16", "float16")
    if run.autocast != "auto" or half or learner_traits(run.learner).apart or device_multiplies_bfloat16(device):
        return []
    return [f"updates in float32, as this {'processor' if device.type == 'cpu' else 'GPU'} does not multiply bfloat16 (autocast=auto)"]


def asked_in_bfloat16(run: Run) -> dict[str, str]:
    """The fields of a run that ask a CPU for products of bfloat16, and what they would be without."""
    fields = {
        "autocast=true": ("autocast=false", run.autocast is True),
        "model.dtype=bfloat16": ("model.dtype=float32", getattr(run.model, "dtype", None) == "bfloat16"),
        "engine.precision=bfloat16": ("engine.precision=float32", engine_traits(run.engine).memory.precision == "bfloat16"),
    }
    return {asks: instead for asks, (instead, there) in fields.items() if there}
