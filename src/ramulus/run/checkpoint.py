"""Checkpoints: everything a run needs to go on bit for bit, written beside the old ones and renamed into place.

A checkpoint is a folder `checkpoints/step-000123` with `model/` (a plain Hugging Face folder), `tensors.safetensors` (optimizer and
random states) and `state.json`. A killed write leaves a `.part` folder that nobody reads. Nothing is pickled.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from ramulus.core.run_folder import path_of, steps
from ramulus.run.lock import being_read

_FORMAT = 1


async def save(folder: Path, step: int, write: Callable[[Path], Awaitable[dict[str, Any]]], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`, whole or not at all; `write` is a learner's `save`, and what it answers is kept as "policy".

    A checkpoint of that step that is there already is kept, unless its step was still to be evaluated and no longer is.

    Raises OSError, naming the checkpoint that remains, when the disk is full or the write fails.
    """
    final = path_of(folder, step)
    there = step in steps(folder)
    if there and (
        state.get("pending") is not None or json.loads((final / "state.json").read_text()).get("pending") is None
    ):
        return final
    part = final.with_name(f".{final.name}.part")
    with failing_clearly(folder, part, step):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        state = {"format": _FORMAT, "step": step, "random": python_random()} | state | {"policy": await write(part)}
        (part / "state.json").write_text(json.dumps(state))
        await asyncio.to_thread(put, part, final, there)
    return final


def put(part: Path, final: Path, there: bool) -> None:
    """Have a finished checkpoint on the disk, in its place."""
    for file in sorted(part.rglob("*")):
        sync(file)
    sync(part)
    if there:
        os.replace(final, final.with_name(f".{final.name}.old.part"))
    os.replace(part, final)
    sync(final.parent)


@contextmanager
def failing_clearly(folder: Path, part: Path, step: int) -> Iterator[None]:
    """Turn a failed write into one sentence, and clear away what it left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        whole = steps(folder)
        kept = f"the checkpoint of step {whole[-1]} is whole" if whole else "there is no earlier checkpoint"
        raise OSError(
            f"cannot save step {step} in {part.parent}: {reason}; {kept}. Free space, then go on with --resume"
        ) from error


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_old(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the last `keep` checkpoints and the best one, and what killed writes left; one that is being read stays until the next time."""
    for step in steps(folder)[:-keep]:
        gone = path_of(folder, step)
        if step != best and not being_read(gone):
            os.replace(gone, gone.with_name(f".{gone.name}.part"))
    for part in (folder / "checkpoints").glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def read_state(folder: Path, step: int) -> dict[str, Any]:
    """The state of a checkpoint; all else in its folder is read by whoever builds the model, and by the learner."""
    path = path_of(folder, step)
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state["format"] > _FORMAT:
        raise ValueError(
            f"{path} was written by a newer ramulus (format {state['format']}, this one reads {_FORMAT}): upgrade ramulus to resume it"
        )
    return state


def python_random() -> dict[str, Any]:
    """The states of Python's and numpy's global generators, for rewards and rules that draw from them."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), place, has_gauss, gauss]}


def restore_random(state: dict[str, Any]) -> None:
    """Set these generators to where the checkpoint found them; those of torch are the learner's."""
    version, internal, gauss = state["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["random"]["numpy"]))


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
